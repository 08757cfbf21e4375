"""ReLU(Conv(A_in)) on a CPU, two to four times as fast as PyTorch's for a map with few heads.

oneDNN's convolution of channels-first tensors is made for many channels. Here the heads come last
in memory, and several neighbouring keys are computed at once, as channels of a wider window.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from evolving_attention.checks import in_graph


def is_faster_for(a_in: Tensor, weight: Tensor) -> bool:
    """Whether the map is on a CPU, has few heads and is large enough, and the kernel is small."""
    if not a_in.is_cpu or a_in.size(1) >= 16:
        return False
    # oneDNN's convolution for bfloat16 (AMX) is wrong for some of the windows that are wider.
    if weight.size(3) > 5:
        return False
    if not torch.jit.is_scripting():
        if torch._C._are_functorch_transforms_active():  # vmap does not support memory formats
            return False
        if in_graph():
            return True
        if forward_ad._current_level >= 0:  # ReLUConv has no forward-mode derivative
            return False
    # PyTorch uses its own convolution for smaller maps, which gains nothing from this layout.
    return a_in.size(0) >= 16 or a_in.numel() > 20_480


def relu_conv(a_in: Tensor, weight: Tensor, bias: Tensor, padding: Tuple[int, int]) -> Tensor:
    """As `relu_conv` in functional.py, which chooses it; the result has the heads last."""
    a_in = a_in.contiguous(memory_format=torch.channels_last)
    if in_graph():
        return F.conv2d(a_in, weight, bias, padding=padding).relu_()
    if torch.jit.is_scripting() or not torch.is_grad_enabled():
        return conv_heads_last(a_in, weight, bias, padding).relu_()
    if torch.is_autocast_enabled("cpu") and a_in.dtype != torch.float64:  # as autocast does
        dtype = torch.get_autocast_dtype("cpu")
        a_in, weight, bias = a_in.to(dtype), weight.to(dtype), bias.to(dtype)
    refined: Tensor = ReLUConv.apply(a_in, weight, bias, padding)
    return refined


def conv_heads_last(
    a_in: Tensor, weight: Tensor, bias: Optional[Tensor], padding: Tuple[int, int]
) -> Tensor:
    """Convolves a map that has the heads last in memory, (B, H, T', S') to (B, H, T, S).

    A vector register holds 16 floats; with few heads some lanes would stay idle. Therefore `count`
    neighbouring keys are computed at once, as channels of a window that moves by `count` keys.
    """
    count, front = keys_at_once(a_in, weight, padding)
    if bias is not None:
        bias = bias.repeat(count)
    padding = (padding[0], padding[1] + front)
    wide = widen(weight, count)  # (count * H, H, K, K + count - 1)
    at_once = F.conv2d(a_in, wide, bias, stride=(1, count), padding=padding)
    heads_last = at_once.permute(0, 2, 3, 1).reshape(  # (B, T, front + S, H)
        a_in.size(0), at_once.size(2), -1, weight.size(0)
    )
    keys = heads_last.size(2) - front
    return heads_last.permute(0, 3, 1, 2).narrow(3, front, keys)  # (B, H, T, S)


def keys_at_once(a_in: Tensor, weight: Tensor, padding: Tuple[int, int]) -> Tuple[int, int]:
    """How many keys to compute at once, and how many columns to add before the first key.

    More than 8 keys gain nothing. At most half of the keys are computed at once, because oneDNN
    leaves memory unwritten when such a convolution returns a single column.
    """
    keys = a_in.size(3) + 2 * padding[1] - weight.size(3) + 1
    count = max(1, min(8, 16 // weight.size(0), keys // 2))
    return count, -keys % count


def widen(weight: Tensor, count: int) -> Tensor:
    """(H, H, K, K) to (count * H, H, K, K + count - 1): the same window, shifted for each key."""
    return torch.cat([F.pad(weight, (key, count - 1 - key)) for key in range(count)])


class ReLUConv(torch.autograd.Function):
    """ReLU(Conv(a_in)) with :func:`conv_heads_last`, which also computes the gradient of a_in.

    Keeps a_in for the backward pass, and one byte for each element that says whether ReLU let it
    through. `narrow` stands for slices, since batched gradients have no rule for full slices.
    """

    @staticmethod
    def forward(a_in: Tensor, weight: Tensor, bias: Tensor, padding: Tuple[int, int]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return conv_heads_last(a_in, weight, bias, padding).relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
        a_in, weight, _, ctx.padding = inputs
        ctx.save_for_backward(a_in, weight, output > 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        with torch.autocast("cpu", enabled=False):
            return *ReLUConv.gradients(ctx, grad), None

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        a_in, weight, positive = ctx.saved_tensors
        top, left = ctx.padding
        heads, reach = weight.size(0), weight.size(3) - 1
        count, front = keys_at_once(a_in, weight, ctx.padding)
        batch, _, queries, keys = grad.shape
        # The columns before the first key do not exist: zeros.
        heads_last = grad.new_empty(batch, queries, front + keys, heads)
        heads_last.narrow(2, 0, front).zero_()
        through_relu = heads_last.narrow(2, front, keys).copy_(grad.permute(0, 2, 3, 1))
        through_relu.mul_(positive.permute(0, 2, 3, 1))

        grad_a_in = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            mirrored = weight.transpose(0, 1).flip(2, 3)  # (H, H, K, K)
            grad_a_in = conv_heads_last(  # (B, H, T', front + S')
                heads_last.permute(0, 3, 1, 2), mirrored, None, (reach - top, reach - left)
            )
            grad_a_in = grad_a_in.narrow(3, front, a_in.size(3)).contiguous()
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            at_once = heads_last.view(batch, queries, -1, count * heads).permute(0, 3, 1, 2)
            _, wide, biases = torch.ops.aten.convolution_backward(
                at_once,  # (B, count * H, T, (front + S) / count)
                a_in,
                widen(weight, count),
                [count * heads],
                [1, count],
                [top, left + front],
                [1, 1],
                False,
                [0, 0],
                1,
                [False, True, True],
            )
            grad_weight = sum(
                part.narrow(3, key, reach + 1) for key, part in enumerate(wide.chunk(count))
            )
            grad_bias = biases.view(count, heads).sum(0)
        return grad_a_in, grad_weight, grad_bias
