"""Vision Transformers with evolving attention: ``ea_vit_*``."""

from functools import partial
from typing import Any, Dict, List, Optional, Tuple, Type, Union

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import LayerType, PatchDropout
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ea_timm.builder import entrypoint
from ea_timm.evolved import run_block
from ea_timm.layers import EvolvingAttention, EvolvingBlock, EvolvingBlocks
from ea_timm.model import EvolvingModel, check_class, complete_options


class EvolvingVisionTransformer(VisionTransformer, EvolvingModel):
    """timm's Vision Transformer with attention maps that evolve from block to block.

    It differs from timm's class in that every block takes the previous block's map and hands its
    own on, through :meth:`forward_features` and :meth:`forward_intermediates`.

    Args:
        alpha: weight of the previous map, in [0, 1]; None means that of the loaded weights,
            else 0.5.
        beta: weight of the convolution over the map, in [0, 1]; None likewise, else 1.0.
        kernel_size: of that convolution, odd; None likewise, else 3.
        learnable: learn each block's alpha and beta, starting from the given values.
        attn_layer: EvolvingAttention or a subclass, or timm's names for the plain one.
        block_fn: EvolvingBlock or a subclass.
        kwargs: as in timm.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        *args: Any,
        alpha: Optional[float] = None,
        beta: Optional[float] = None,
        kernel_size: Optional[int] = None,
        learnable: bool = False,
        attn_layer: LayerType = EvolvingAttention,
        block_fn: Type[nn.Module] = EvolvingBlock,
        **kwargs: Any,
    ) -> None:
        evolution = complete_options(alpha, beta, kernel_size, learnable)
        attn_layer = EvolvingAttention if attn_layer in ("", "attn") else attn_layer
        check_class("attn_layer", attn_layer, EvolvingAttention)
        check_class("block_fn", block_fn, EvolvingBlock)
        block_fn = partial(block_fn, **evolution)
        super().__init__(*args, attn_layer=attn_layer, block_fn=block_fn, **kwargs)
        if isinstance(self.patch_drop, PatchDropout):
            # The convolution reads neighbours: the remaining patches must stay in order.
            self.patch_drop.ordered = True
        self.blocks = EvolvingBlocks(*self.blocks)
        self.remember(alpha, beta, kernel_size)

    def embed(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> the input tokens of the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(
        self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (batch, tokens, embed_dim) of images (batch, channels, height, width)."""
        x = self.blocks(self.embed(x), attn_mask, is_causal, self.grad_checkpointing)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]], Dict[str, Any]]:
        """The features of chosen blocks; arguments and results as in timm."""
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x = self.embed(x)

        taken = []
        attn_logits: Optional[Tensor] = None
        for i, blk in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x, attn_logits = run_block(
                blk, self.grad_checkpointing, x, attn_logits, attn_mask, is_causal
            )
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        prefix = [y[:, : self.num_prefix_tokens] for y in taken] if self.num_prefix_tokens else None
        intermediates = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            intermediates = [
                y.transpose(1, 2).reshape(y.shape[0], -1, *grid).contiguous() for y in intermediates
            ]

        if output_dict:
            result: Dict[str, Any] = {"image_intermediates": intermediates}
            if return_prefix_tokens and prefix is not None:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens and prefix is not None:
            intermediates = list(zip(intermediates, prefix, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates


def cfg(**kwargs: Any) -> Dict[str, Any]:
    """A pretrained_cfg without weights, for the input of timm's ``vit_*_patch16_224``."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


TINY = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
SMALL = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
LARGE = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16)

MODELS = {
    "ea_vit_tiny_patch16_224": TINY,
    "ea_vit_small_patch16_224": SMALL,
    "ea_vit_base_patch16_224": BASE,
    "ea_vit_base_patch16_384": BASE,
    "ea_vit_large_patch16_224": LARGE,
    "ea_vit_tiny": TINY,
    "ea_vit_small": SMALL,
    "ea_vit_base": BASE,
    "ea_vit_large": LARGE,
}

default_cfgs = generate_default_cfgs(
    {
        **{name: cfg() for name in MODELS},
        "ea_vit_base_patch16_384": cfg(input_size=(3, 384, 384), crop_pct=1.0),
    }
)

for name, sizes in MODELS.items():
    globals()[name] = entrypoint(
        __name__,
        name,
        EvolvingVisionTransformer,
        pretrained_filter_fn=checkpoint_filter_fn,
        out_indices=3,
        **sizes,
    )
