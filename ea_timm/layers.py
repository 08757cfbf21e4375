"""timm's self-attention and block, which take the previous block's map and return their own."""

from typing import NamedTuple, Optional

import torch
from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask
from timm.models import register_notrace_function
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ea_timm.evolved import Evolved, HandsMapOn, check_features, map_before, run_block
from evolving_attention import AttentionEvolution, AttentionProbe
from evolving_attention.checks import check_count, expands_to

# torch.fx traces with proxies, which have no shape, dtype or truth value: functions that need these
# must be nodes of its graph.
torch.fx.wrap("maybe_add_mask")


class Masks(NamedTuple):
    """What a mask means for the softmax and for the convolution over the map.

    Attributes:
        bias: to add to the logits for the softmax, -inf where a query must not see a key; 0 in the
            rows of queries that see no key, so that softmax and gradients are not NaN.
        empty: True for queries that see no key.
        absent: True for cells of the map that do not exist: those that the mask forbids, and the
            row of a token that no query may see, which is padding.
        window: of the convolution.
    """

    bias: Optional[Tensor]
    empty: Optional[Tensor]
    absent: Optional[Tensor]
    window: str


@torch.fx.wrap
@register_notrace_function
def masks_of(attn_logits: Tensor, attn_mask: Optional[Tensor], is_causal: bool) -> Masks:
    """The masks of a call; arguments as in :meth:`EvolvingAttention.forward`.

    Numbers of -1e4 or less in `attn_mask`, which are often used for -inf, forbid cells as well.

    Raises:
        ValueError: `attn_mask` has a wrong dtype or shape, or is given with `is_causal`.
    """
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None if is_causal is True")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise ValueError(
                f"attn_mask must be bool (True: a query sees a key) or float, got {attn_mask.dtype}"
            )
        if not expands_to(attn_mask, attn_logits):
            raise ValueError(
                f"attn_mask must be broadcastable to {attn_logits.shape}, got {attn_mask.shape}"
            )
        if attn_mask.dim() < 2:
            attn_mask = attn_mask.expand(1, attn_logits.size(-1))
    window = "causal" if is_causal else "bidirectional"
    bias = resolve_self_attn_mask(attn_logits.size(-1), attn_logits, attn_mask, is_causal)
    if bias is None:
        return Masks(None, None, None, window)
    hidden = bias <= -1e4
    absent = hidden | hidden.all(dim=-2, keepdim=True).transpose(-2, -1)
    bias = bias.to(attn_logits.dtype)  # as fused attention does; a low number may become -inf
    empty = (bias == float("-inf")).all(dim=-1, keepdim=True)
    return Masks(bias.masked_fill(empty, 0.0), empty, absent, window)


@torch.fx.wrap
@register_notrace_function
def maybe_clear(attn_probs: Tensor, empty: Optional[Tensor]) -> Tensor:
    """Sets the probabilities of queries that see no key to 0, as torch's fused attention does."""
    return attn_probs if empty is None else attn_probs.masked_fill(empty, 0.0)


class EvolvingAttention(Attention):
    """timm's self-attention, whose map evolves from that of the previous layer.

    It differs from timm's class in that :meth:`forward` takes the previous map and also returns its
    own, so the logits are always computed, never inside a fused kernel.

    Attributes:
        evolution: how the map evolves; None in the first layer, which has no previous map.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.evolution = None
        self.probe = AttentionProbe()

    def forward(
        self,
        x: Tensor,
        prev_attn_logits: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Evolved:
        """As in timm, except for:

        Args:
            x: (batch, tokens, dim).
            prev_attn_logits: the map of the previous layer, (batch, heads, tokens, tokens). Without
                `evolution`, as in the first layer, it is not read and may be None.
            attn_mask: bool, True where a query sees a key, or numbers to add for the softmax;
                broadcastable to (batch, heads, tokens, tokens). A token that no query sees, its own
                included, has no influence on the others. Where queries see different keys, the
                convolution still reads the visible cells around; to exclude the future, use
                `is_causal`.
            is_causal: no query sees later keys, and no cell of the map does.

        Returns:
            The output, (batch, tokens, dim), and the map to hand on.

        Raises:
            ValueError: a mask has a wrong dtype or shape, or the map has another shape or is
            missing.
        """
        B, N, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)

        attn_logits = (q * self.scale) @ k.transpose(-2, -1)  # (B, H, N, N)
        masks = masks_of(attn_logits, attn_mask, is_causal)
        if self.evolution is not None:
            prev_attn_logits = map_before(prev_attn_logits)
            # Without a convolution, which would spread them, hidden cells may stay as they are.
            absent = None if self.evolution.weight is None else masks.absent
            attn_logits = self.evolution(attn_logits, prev_attn_logits, absent, masks.window)
        attn_probs = maybe_add_mask(attn_logits, masks.bias).softmax(dim=-1)
        attn_probs = maybe_clear(attn_probs, masks.empty)
        attn_probs = self.attn_drop(self.probe(attn_probs, attn_logits))
        x = (attn_probs @ v).transpose(1, 2)  # (B, N, H, head_dim)
        x = x.reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        return Evolved(self.proj_drop(self.proj(x)), attn_logits)


class EvolvingBlock(Block, HandsMapOn):
    """timm's transformer block, which takes the previous block's map and hands its own on.

    Args:
        alpha, beta, kernel_size, learnable: as in :class:`AttentionEvolution`.
        depth: index of the block; block 0 has plain attention.
        kwargs: as in timm.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *args,
        alpha: float,
        beta: float,
        kernel_size: int = 3,
        learnable: bool = False,
        attn_layer: type = EvolvingAttention,
        depth: int = 0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs,
    ) -> None:
        check_count("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the embedding's {dim}, got {num_heads}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, *args, attn_layer=attn_layer, depth=depth, **dd, **kwargs)
        if depth > 0:
            self.attn.evolution = AttentionEvolution(
                num_heads, alpha, beta, kernel_size, learnable=learnable, **dd
            )

    def forward(
        self,
        x: Tensor,
        prev_attn_logits: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Evolved:
        """Tokens and map; for the arguments see :meth:`EvolvingAttention.forward`."""
        if not torch.jit.is_scripting():
            check_features(x)
        attended, attn_logits = self.attn(self.norm1(x), prev_attn_logits, attn_mask, is_causal)
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return Evolved(x, attn_logits)


class EvolvingBlocks(nn.Sequential):
    """Blocks in sequence, which take tokens and return tokens; the maps stay inside."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        """Returns the tokens (batch, tokens, dim) after all blocks.

        Args:
            x: any tokens, such as those that a masked autoencoder keeps.
            attn_mask, is_causal: as in :meth:`EvolvingAttention.forward`.
            checkpointing: recompute each block in the backward pass.

        Raises:
            TypeError: a block takes no map or hands none on.
            ValueError: the first block evolves, as that of ``blocks[3:]`` does.
        """
        attn_logits: Optional[Tensor] = None
        for block in self:
            if torch.jit.is_scripting():
                x, attn_logits = block(x, attn_logits, attn_mask, is_causal)
            else:
                x, attn_logits = run_block(
                    block, checkpointing, x, attn_logits, attn_mask, is_causal
                )
        return x
