"""Attention-augmented ResNets with evolving attention: ``ea_resnet*``."""

from functools import partial
from itertools import product
from numbers import Integral
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ea_timm.attention2d import AugmentedConv2d, RelativeLogits2d
from ea_timm.builder import entrypoint
from ea_timm.evolved import Evolved, HandsMapOn, check_features, run_block
from ea_timm.model import EvolvingModel, check_class, complete_options
from evolving_attention import AttentionEvolution
from evolving_attention.checks import check_unit_interval, is_a
from evolving_attention.loading import WRAPPED


class EvolvingBasicBlock(BasicBlock, HandsMapOn):
    """timm's basic block, which takes the previous block's map and hands its own on.

    Its `conv1` and `conv2` must be :class:`AugmentedConv2d`; the map evolves in both.
    """

    plain = BasicBlock
    augmented = ("conv1", "conv2")
    share = 4

    def forward(self, x: Tensor, prev_attn_logits: Optional[Tensor] = None) -> Evolved:
        """Features and map; `prev_attn_logits` as in :class:`EvolvingAttention2d`."""
        if not torch.jit.is_scripting():
            check_features(x)
        shortcut = x
        x, attn_logits = self.conv1(x, prev_attn_logits)
        x = self.aa(self.act1(self.drop_block(self.bn1(x))))
        x, attn_logits = self.conv2(x, attn_logits)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return Evolved(self.act2(x + shortcut), attn_logits)


class EvolvingBottleneck(Bottleneck, HandsMapOn):
    """timm's bottleneck, which takes the previous block's map and hands its own on.

    Its `conv2` must be an :class:`AugmentedConv2d`.
    """

    plain = Bottleneck
    augmented = ("conv2",)
    share = 8

    def forward(self, x: Tensor, prev_attn_logits: Optional[Tensor] = None) -> Evolved:
        """Features and map; `prev_attn_logits` as in :class:`EvolvingAttention2d`."""
        if not torch.jit.is_scripting():
            check_features(x)
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x, attn_logits = self.conv2(x, prev_attn_logits)
        x = self.aa(self.act2(self.drop_block(self.bn2(x))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return Evolved(self.act3(x + shortcut), attn_logits)


class EvolvingStage(nn.Sequential):
    """Blocks in sequence; the map goes from one to the next beside the features.

    Called with features only, as in a Sequential of the model's children, it returns features only,
    and the map travels to the next stage as their attribute `attn_logits`. If it is lost on
    the way, that stage raises an error.
    """

    def forward(  # no annotation of the result: in TorchScript it is always an Evolved
        self,
        x: Tensor,
        attn_logits: Optional[Tensor] = None,
        with_map: bool = False,
        checkpointing: bool = False,
    ):
        """Features after all blocks; with the map, an :class:`Evolved`, if `with_map` or scripted.

        Args:
            x: (batch, channels, height, width).
            attn_logits: the map of the previous stage; None means the one that came with `x`,
                if any.
            with_map: return the map beside the features, as the model needs it.
            checkpointing: recompute each block in the backward pass.

        Raises:
            TypeError: a block takes no map or hands none on.
            ValueError: the first block evolves, but there is no previous map.
        """
        if torch.jit.is_scripting():
            for block in self:
                x, attn_logits = block(x, attn_logits)
            return Evolved(x, attn_logits)
        else:
            check_features(x)
            if attn_logits is None and not with_map:
                attn_logits = x.__dict__.get("attn_logits")
            for block in self:
                x, attn_logits = run_block(block, checkpointing, x, attn_logits)
            if with_map:
                return Evolved(x, attn_logits)
            x.attn_logits = attn_logits
            return x


class EvolvingResNet(ResNet, EvolvingModel):
    """timm's ResNet, augmented by evolving attention in its last three stages.

    As in the authors' code, in every bottleneck of these stages attention computes an
    eighth of the 3x3 convolution's channels; in every basic block, a quarter in
    each of its two. The second stage attends on a map pooled to half its size. Maps evolve from
    one attention to the next, and from stage to stage where the size stays the same (so from the
    second to the third, while the fourth starts with a plain map).

    Args:
        layers: blocks of each stage.
        block: EvolvingBottleneck, EvolvingBasicBlock or a subclass.
        img_size: of the tables of relative positions, which are resized for other sizes; None
            means that of the loaded weights, else 224.
        alpha: weight of the previous map, in [0, 1]; None means that of the loaded weights,
            else 0.5.
        beta: weight of the convolution over the map, in [0, 1]; None likewise, else 1.0.
        kernel_size: of that convolution, odd; None likewise, else 3.
        learnable: learn each block's alpha and beta, starting from the given values.
        num_heads: heads of every attention.
        attn_drop_rate: dropout of the attention probabilities.
        kwargs: as in timm.

    Attributes:
        img_size: (height, width) of the images that the tables of relative positions are for.

    Raises:
        ValueError: an argument is out of range, or the channels are not divisible.
    """

    fresh_parts = ("attn", "evolution")

    def __init__(
        self,
        layers: Tuple[int, ...],
        *,
        block: Type[Union[EvolvingBasicBlock, EvolvingBottleneck]] = EvolvingBottleneck,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        alpha: Optional[float] = None,
        beta: Optional[float] = None,
        kernel_size: Optional[int] = None,
        learnable: bool = False,
        num_heads: int = 8,
        attn_drop_rate: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        options = complete_options(alpha, beta, kernel_size, learnable)
        evolution = partial(AttentionEvolution, num_heads, **options, **factory)
        size = to_2tuple(224 if img_size is None else img_size)
        if len(size) != 2 or not all(is_a(Integral, side) and side > 0 for side in size):
            raise ValueError(
                "img_size must be one or two positive whole numbers (height, width), "
                f"got {img_size!r}"
            )
        check_unit_interval("attn_drop_rate", attn_drop_rate)
        check_class("block", block, EvolvingBottleneck, EvolvingBasicBlock)
        super().__init__((block.plain, block, block, block), layers, **factory, **kwargs)

        prev_reduction = None
        reduction = self.feature_info[1]["reduction"]
        for info in self.feature_info[2:]:
            stage = getattr(self, info["module"])
            downsample = info["module"] == "layer2"
            for part, name in product(stage, block.augmented):
                conv = getattr(part, name)
                reduction *= conv.stride[0]
                map_reduction = 2 * reduction if downsample else reduction
                augmented = AugmentedConv2d(
                    conv,
                    num_heads,
                    map_size=(-(-size[0] // map_reduction), -(-size[1] // map_reduction)),
                    share=block.share,
                    downsample=downsample,
                    attn_drop=attn_drop_rate,
                    evolution=evolution() if map_reduction == prev_reduction else None,
                )
                augmented.attn.position.keeps_size = img_size is not None
                setattr(part, name, augmented)
                reduction, prev_reduction = info["reduction"], map_reduction
            setattr(self, info["module"], EvolvingStage(*stage))
        self.img_size = size
        self.remember(alpha, beta, kernel_size)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialises all weights: timm's as timm does, those of attention as the authors do."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, AugmentedConv2d):
                module.attn.reset_parameters()

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        self.adopt_img_size(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adopt_img_size(self, state_dict: Dict[str, Tensor], prefix: str) -> None:
        """Records the image size of tables that will replace the model's, see RelativeLogits2d.

        timm's nominal size follows. Both are rounded up to whole cells of the map.
        """
        modules = self.named_modules(prefix=prefix.rstrip("."))
        tables = [(name, x) for name, x in modules if isinstance(x, RelativeLogits2d)]
        if not tables or tables[0][1].keeps_size:
            return
        name, own = tables[0]
        name = name.replace(WRAPPED, "")
        given = [state_dict.get(f"{name}.{axis}") for axis in ("r_height", "r_width")]
        if all(table is not None for table in given):
            self.img_size = tuple(
                size * (len(new) + 1) // (len(old) + 1)
                for size, old, new in zip(
                    self.img_size, (own.r_height, own.r_width), given, strict=True
                )
            )
            update_model_input_size(self, self.img_size)

    def stem(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> the features before the pooling."""
        return self.act1(self.bn1(self.conv1(x)))

    def first_stage(self, x: Tensor) -> Tensor:
        """The stage without attention."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.layer1, x)
        return self.layer1(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (batch, channels, height, width) of images, before the pooling."""
        attn_logits: Optional[Tensor] = None
        x = self.first_stage(self.maxpool(self.stem(x)))
        x, attn_logits = self.layer2(x, attn_logits, True, self.grad_checkpointing)
        x, attn_logits = self.layer3(x, attn_logits, True, self.grad_checkpointing)
        x, attn_logits = self.layer4(x, attn_logits, True, self.grad_checkpointing)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """The features of the stem and the stages; arguments and results as in timm."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(5, indices)
        last = max_index if stop_early else 4
        intermediates = []
        attn_logits: Optional[Tensor] = None
        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)
        if last >= 1:
            x = self.first_stage(x)
            if 1 in take_indices:
                intermediates.append(x)
        if last >= 2:  # TorchScript cannot loop over modules in a tuple
            x, attn_logits = self.layer2(x, attn_logits, True, self.grad_checkpointing)
            if 2 in take_indices:
                intermediates.append(x)
        if last >= 3:
            x, attn_logits = self.layer3(x, attn_logits, True, self.grad_checkpointing)
            if 3 in take_indices:
                intermediates.append(x)
        if last >= 4:
            x, attn_logits = self.layer4(x, attn_logits, True, self.grad_checkpointing)
            if 4 in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """As in timm."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        for info in self.feature_info[2:]:
            if len(getattr(self, info["module"])) == 0:
                setattr(self, info["module"], EvolvingStage())
        return take_indices


MODELS = {
    "ea_resnet34": dict(layers=(3, 4, 6, 3), block=EvolvingBasicBlock),
    "ea_resnet50": dict(layers=(3, 4, 6, 3)),
    "ea_resnet101": dict(layers=(3, 4, 23, 3)),
    "ea_resnet152": dict(layers=(3, 8, 36, 3)),
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in MODELS
    }
)


for name, sizes in MODELS.items():
    globals()[name] = entrypoint(
        __name__, name, EvolvingResNet, out_indices=(0, 1, 2, 3, 4), **sizes
    )
