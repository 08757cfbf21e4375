"""The two equations of evolving attention, :func:`mix` and :func:`refine`, as the models run them.

Shapes: B batch, H heads, T queries, S keys, K kernel size.
"""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from evolving_attention import cpu
from evolving_attention.checks import (
    can_be_read,
    check_maps,
    check_unmasked,
    check_weights,
    check_window,
    in_graph,
)


def evolve(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    window: str = "bidirectional",
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Evolves a layer's attention map from that of the previous layer (paper, section 3).

    Args:
        attn_logits: this layer's logits before mask and softmax, scaled, (B, H, T, S), of a
            floating-point dtype; finite.
        prev_attn_logits: the map that the previous layer handed on, same shape and dtype.
        weight: (H, H, K, K), K odd, of the same dtype unless autocast is on; None for no
            convolution, whatever `beta` is.
        bias: (H,), likewise.
        alpha: weight of the previous map, in [0, 1]; if learned, a tensor of one element,
            whose range is not checked.
        beta: weight of the convolution, in [0, 1]; likewise.
        window: "bidirectional" (centred), "causal" (current and earlier queries and keys,
            for a decoder's self-attention) or "cross" (current and earlier queries, centred
            keys, for encoder-decoder attention).
        mask: bool, broadcastable to (B, H, T, S); True where a cell does not exist, because
            its query or key is padding or its key lies in the query's future. Logits that are
            masked by -inf or -1e9 instead are an error, which eager mode finds unless such a mask
            spares the first, the middle and the last query.

    Returns:
        The evolved map before the softmax, (B, H, T, S), finite everywhere. The softmax still
        needs the mask.

    Raises:
        ValueError: a shape, dtype, number or `window` is wrong; the message names the argument.
    """
    check_maps(attn_logits, prev_attn_logits, mask)
    check_weights(weight, bias, alpha, beta, attn_logits)
    check_window(window)
    if can_be_read(attn_logits):
        check_unmasked(attn_logits, prev_attn_logits, mask, isinstance(alpha, Tensor))
    a_in = mix(attn_logits, prev_attn_logits, alpha, mask)
    return refine(a_in, weight, bias, beta, window)


def mix(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    alpha: Union[float, Tensor],
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Equation 1: A_in = alpha * A^{k-1} + (1 - alpha) * logits, zero where `mask` is True."""
    a_in = attn_logits
    if not is_fixed_at(0.0, alpha):
        a_in = lerp(attn_logits, prev_attn_logits, alpha)
    if mask is not None:
        # To the convolution, padded and future cells must look like those beyond the border of the
        # map. Otherwise a sentence's map would depend on how far its batch pads it.
        a_in = a_in.masked_fill(mask, 0.0)
    return a_in


def refine(
    a_in: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    beta: Union[float, Tensor],
    window: str,
    rows: Optional[Tensor] = None,
) -> Tensor:
    """Equation 2: A = beta * ReLU(Conv(A_in)) + (1 - beta) * A_in.

    `rows` (B, H, K - 1, S) are the K - 1 rows that precede A_in, zeros if None. They are valid only
    for windows that read no later rows ("causal", "cross").
    """
    if weight is None or bias is None or is_empty(a_in):
        return a_in.contiguous()
    bordered, padding = add_border(a_in, weight.size(3), window, rows)
    refined = relu_conv(bordered, weight, bias, padding)  # (B, H, T, S)
    refined = refined.to(a_in.dtype)  # autocast may have computed it in half precision
    if not is_fixed_at(1.0, beta):
        refined = lerp(a_in, refined, beta)
    return refined.contiguous()


def relu_conv(a_in: Tensor, weight: Tensor, bias: Tensor, padding: Tuple[int, int]) -> Tensor:
    """ReLU(Conv(A_in)): the one place that chooses an implementation.

    Every implementation has these arguments and this result, and gradients for its first three
    arguments. TorchScript compiles this function, so each implementation must compile, too.

    Args:
        a_in: (B, H, T', S').
        weight: (H, H, K, K).
        bias: (H,).
        padding: zeros to add (above and below, left and right).

    Returns:
        (B, H, T' + 2 * padding[0] - K + 1, S' + 2 * padding[1] - K + 1), in any memory format.
    """
    if cpu.is_faster_for(a_in, weight):
        return cpu.relu_conv(a_in, weight, bias, padding)
    return F.conv2d(a_in, weight, bias, padding=padding).relu_()


def add_border(
    a_in: Tensor, kernel_size: int, window: str, rows: Optional[Tensor]
) -> Tuple[Tensor, Tuple[int, int]]:
    """Adds the zeros or `rows` that an asymmetric window reads beyond the border of A_in.

    Returns (B, H, T', S') and the symmetric padding that is left to the convolution.
    """
    reach = kernel_size - 1
    if window == "bidirectional":
        return a_in, (reach // 2, reach // 2)
    if window not in ("causal", "cross"):
        raise ValueError(f"window must be one of bidirectional, causal, cross, got '{window}'")
    left = reach if window == "causal" else reach // 2
    top = reach
    if rows is not None:
        a_in, top = torch.cat([rows, a_in], dim=2), 0  # (B, H, K - 1 + T, S)
    return F.pad(a_in, (left, reach - left, top, 0)), (0, 0)  # (B, H, T + K - 1, S + K - 1)


def is_empty(a_in: Tensor) -> bool:
    """Whether there are no queries or no keys, which conv2d refuses; a graph does not ask."""
    if in_graph():
        return False
    return a_in.size(2) == 0 or a_in.size(3) == 0


def is_fixed_at(number: float, weight: Union[float, Tensor]) -> bool:
    """Whether alpha or beta is a constant equal to `number`."""
    if isinstance(weight, Tensor):
        return False
    return weight == number


def lerp(start: Tensor, end: Tensor, weight: Union[float, Tensor]) -> Tensor:
    """weight * end + (1 - weight) * start, for a number or a tensor of one element."""
    # Some converters do not support lerp. TorchScript needs the first condition to leave this out.
    if not torch.jit.is_scripting() and in_graph():
        if isinstance(weight, Tensor):
            weight = weight.to(start.dtype)
        return weight * end + (1 - weight) * start
    if isinstance(weight, Tensor):  # TorchScript needs the type to choose the overload
        return torch.lerp(start, end, weight.to(start.dtype))
    return torch.lerp(start, end, weight)
