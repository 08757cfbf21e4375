"""The paper's equations as printed: slow, differentiable, and what the tests compare with.

A^k_in = alpha * A^{k-1} + (1 - alpha) * logits^k
A^k    = beta * ReLU(Conv(A^k_in)) + (1 - beta) * A^k_in
out^k  = softmax(mask(A^k)) V

Shapes: maps (B, H, T, S): batch, heads, queries, keys; `weight` (H, H, K, K), K odd; `bias`
(H,); `mask` bool, broadcastable to the maps, True where a cell does not exist (padding query,
padding key, future key).
"""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F


def mix(attn_logits: Tensor, prev_attn_logits: Tensor, alpha: float) -> Tensor:
    """A_in of equation 1: (B, H, T, S)."""
    return alpha * prev_attn_logits + (1 - alpha) * attn_logits


def convolve(a_in: Tensor, weight: Tensor, bias: Tensor, window: str) -> Tensor:
    """Conv of equation 2, as a sum over shifted maps: (B, H, T, S)."""
    queries, keys = a_in.shape[-2:]
    size = weight.shape[-1]
    # (rows above, columns to the left) of the cell that the window starts at.
    above = size // 2 if window == "bidirectional" else size - 1
    left = size - 1 if window == "causal" else size // 2
    padded = F.pad(a_in, (size, size, size, size))
    out = bias.view(1, -1, 1, 1).expand(a_in.shape)
    for row in range(size):
        for column in range(size):
            top, start = size - above + row, size - left + column
            shifted = padded[..., top : top + queries, start : start + keys]
            out = out + torch.einsum("oi,bits->bots", weight[..., row, column], shifted)
    return out


def evolve(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: float,
    beta: float,
    window: str = "bidirectional",
    mask: Optional[Tensor] = None,
) -> Tensor:
    """A^k of equation 2: (B, H, T, S)."""
    a_in = mix(attn_logits, prev_attn_logits, alpha)
    if mask is not None:
        # A convolution reads zeros beyond the border, so cells that do not exist are zero too.
        a_in = torch.where(mask, torch.zeros_like(a_in), a_in)
    return beta * F.relu(convolve(a_in, weight, bias, window)) + (1 - beta) * a_in


def attend(attn_logits: Tensor, value: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """softmax(mask(A)) V: (B, H, T, D) from `value` (B, H, S, D).

    A row whose every key is masked gives NaN, as the equation does.
    """
    if mask is not None:
        attn_logits = attn_logits.masked_fill(mask, float("-inf"))
    return attn_logits.softmax(dim=-1) @ value
