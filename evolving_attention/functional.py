"""The two equations of evolving attention, as the models run them."""

from numbers import Integral, Real
from typing import Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from evolving_attention.pieces import in_graph

WINDOWS = ("bidirectional", "causal", "cross")


def mix_and_refine(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    window: str,
    mask: Optional[Tensor],
) -> Tensor:
    """Both equations; see :func:`evolve`, which checks its arguments besides."""
    a_in = mix(attn_logits, prev_attn_logits, alpha, mask)
    return refine(a_in, weight, bias, beta, window).contiguous()


def mix(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    alpha: Union[float, Tensor],
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Equation 1: A_in = alpha * A^{k-1} + (1 - alpha) * logits, zero where `mask` is True."""
    a_in = attn_logits
    if not _fixed_at(0.0, alpha):
        a_in = _lerp(attn_logits, prev_attn_logits, alpha)
    if mask is not None:
        # The convolution reads zeros beyond the border of a map; a padded or future cell must
        # look the same, or a sentence's map would depend on the batch it is in.
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

    `rows` (B, H, K - 1, S) are the rows of A_in above the first one, zeros if None; only the
    windows that look up alone ("causal", "cross") can take them.
    """
    if weight is None or bias is None:
        return a_in
    refined = _relu_conv(a_in, weight, bias, window, rows).to(a_in.dtype)  # autocast may halve it
    if _fixed_at(1.0, beta):
        return refined
    return _lerp(a_in, refined, beta)


def _fixed_at(number: float, weight: Union[float, Tensor]) -> bool:
    if isinstance(weight, Tensor):
        return False
    return weight == number


def _lerp(start: Tensor, end: Tensor, weight: Union[float, Tensor]) -> Tensor:
    if not torch.jit.is_scripting() and in_graph():  # not every converter of graphs knows lerp
        return weight * end + (1 - weight) * start
    if isinstance(weight, Tensor):  # TorchScript chooses the overload by the type
        return torch.lerp(start, end, weight)
    return torch.lerp(start, end, weight)


def _relu_conv(
    a_in: Tensor, weight: Tensor, bias: Tensor, window: str, rows: Optional[Tensor]
) -> Tensor:
    reach = weight.size(3) - 1
    padding = (reach // 2, reach // 2)
    if window != "bidirectional":  # looks up; "causal" to the left too, "cross" to both sides
        left = reach if window == "causal" else reach // 2
        top = reach
        if rows is not None:
            a_in, top = torch.cat([rows, a_in], dim=2), 0
        a_in, padding = F.pad(a_in, (left, reach - left, top, 0)), (0, 0)
    if not _heads_last(a_in):
        return F.conv2d(a_in, weight, bias, padding=padding).relu_()
    a_in = a_in.contiguous(memory_format=torch.channels_last)
    if in_graph():
        return F.conv2d(a_in, weight, bias, padding=padding).relu_()
    if torch.jit.is_scripting() or not torch.is_grad_enabled():
        return _conv_heads_last(a_in, weight, bias, padding).relu_()
    if torch.is_autocast_enabled("cpu") and a_in.dtype != torch.float64:  # as autocast itself
        dtype = torch.get_autocast_dtype("cpu")
        a_in, weight, bias = a_in.to(dtype), weight.to(dtype), bias.to(dtype)
    return _ReLUConv.apply(a_in, weight, bias, padding)


def _conv_heads_last(
    a_in: Tensor, weight: Tensor, bias: Optional[Tensor], padding: Tuple[int, int]
) -> Tensor:
    """The convolution of few heads: several neighbouring keys as channels of a wider window.

    A CPU's vector registers hold 16 numbers, of which the heads of one key leave some idle.
    Takes and returns maps with the heads last in memory.
    """
    count, front = _keys_at_once(a_in, weight, padding)
    if bias is not None:
        bias = bias.repeat(count)
    padding = (padding[0], padding[1] + front)
    at_once = F.conv2d(a_in, _widen(weight, count), bias, stride=(1, count), padding=padding)
    heads_last = at_once.permute(0, 2, 3, 1).reshape(
        a_in.size(0), at_once.size(2), -1, weight.size(0)
    )
    keys = heads_last.size(2) - front
    return heads_last.permute(0, 3, 1, 2).narrow(3, front, keys)


def _keys_at_once(a_in: Tensor, weight: Tensor, padding: Tuple[int, int]) -> Tuple[int, int]:
    """How many keys at once, and how many of the first ones lie before the first key.

    More than 8 at once gain nothing more. All keys at once never: oneDNN's convolutions of such
    windows to a single column leave memory unwritten.
    """
    keys = a_in.size(3) + 2 * padding[1] - weight.size(3) + 1
    count = max(1, min(8, 16 // weight.size(0), keys // 2))
    return count, -keys % count


def _widen(weight: Tensor, count: int) -> Tensor:
    """(H, H, K, K) to (count * H, H, K, K + count - 1): the same window for each of the keys."""
    return torch.cat([F.pad(weight, (key, count - 1 - key)) for key in range(count)])


class _ReLUConv(torch.autograd.Function):
    """ReLU(Conv(a_in)) by :func:`_conv_heads_last`, which computes the gradient of a_in as well.

    It keeps a_in, and a byte for each number to know what ReLU let through. (Slices are narrowed,
    since batched gradients know no rule for a slice that takes all.)
    """

    @staticmethod
    def forward(a_in: Tensor, weight: Tensor, bias: Tensor, padding: Tuple[int, int]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return _conv_heads_last(a_in, weight, bias, padding).relu_()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        a_in, weight, _, ctx.padding = inputs
        ctx.save_for_backward(a_in, weight, output > 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        with torch.autocast("cpu", enabled=False):
            return *_ReLUConv.gradients(ctx, grad), None

    @staticmethod
    def gradients(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        a_in, weight, positive = ctx.saved_tensors
        top, left = ctx.padding
        heads, reach = weight.size(0), weight.size(3) - 1
        count, front = _keys_at_once(a_in, weight, ctx.padding)
        batch, _, queries, keys = grad.shape
        # Zeros for the columns before the first key, as they do not exist.
        heads_last = grad.new_empty(batch, queries, front + keys, heads)
        heads_last.narrow(2, 0, front).zero_()
        through_relu = heads_last.narrow(2, front, keys).copy_(grad.permute(0, 2, 3, 1))
        through_relu.mul_(positive.permute(0, 2, 3, 1))

        grad_a_in = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            mirrored = weight.transpose(0, 1).flip(2, 3)
            grad_a_in = _conv_heads_last(
                heads_last.permute(0, 3, 1, 2), mirrored, None, (reach - top, reach - left)
            )
            grad_a_in = grad_a_in.narrow(3, front, a_in.size(3)).contiguous()
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            at_once = heads_last.view(batch, queries, -1, count * heads).permute(0, 3, 1, 2)
            _, wide, biases = torch.ops.aten.convolution_backward(
                at_once,
                a_in,
                _widen(weight, count),
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


def _heads_last(a_in: Tensor) -> bool:
    """Whether to put the heads last in memory for the convolution.

    On a CPU oneDNN's own layout for channels first wants many channels: with a map's few it takes
    two to four times as long. The smallest maps it leaves to torch's own convolution.
    """
    if not a_in.is_cpu or a_in.size(1) >= 16:
        return False
    if not torch.jit.is_scripting():
        if torch._C._are_functorch_transforms_active():  # vmap knows no memory order
            return False
        if in_graph():
            return True
        if forward_ad._current_level >= 0:  # nor has _ReLUConv derivatives forward
            return False
    return a_in.size(0) >= 16 or a_in.numel() > 20_480


def check_maps(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    mask: Optional[Tensor],
    num_heads: int,
) -> None:
    """Raises ValueError, naming the argument, unless the maps and the mask fit each other."""
    if attn_logits.dim() != 4:
        raise ValueError(
            f"attn_logits must be (batch, heads, queries, keys), got shape {attn_logits.shape}"
        )
    if attn_logits.size(1) != num_heads:
        raise ValueError(
            f"attn_logits has {attn_logits.size(1)} heads, this layer was made with "
            f"num_heads={num_heads}"
        )
    if prev_attn_logits.shape != attn_logits.shape:
        raise ValueError(
            f"prev_attn_logits has shape {prev_attn_logits.shape}, attn_logits "
            f"{attn_logits.shape}: a map evolves only from one of the same batch, heads, "
            "queries and keys"
        )
    if prev_attn_logits.dtype != attn_logits.dtype:
        raise ValueError(
            f"prev_attn_logits has dtype {prev_attn_logits.dtype}, attn_logits "
            f"{attn_logits.dtype}: they must be the same"
        )
    if mask is not None:
        check_mask("mask", mask, attn_logits)


def check_mask(name: str, mask: Tensor, attn_logits: Tensor) -> None:
    """Raises ValueError, naming the mask, unless it is bool and broadcastable to the map."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be of dtype torch.bool (True: no cell), got {mask.dtype}")
    if not expands_to(mask, attn_logits):
        raise ValueError(
            f"{name} must be broadcastable to {attn_logits.shape}, got shape {mask.shape}"
        )


def expands_to(mask: Tensor, attn_logits: Tensor) -> bool:
    """Whether the mask is broadcastable to the map; beside a larger one the map would grow."""
    if mask.dim() > attn_logits.dim():
        return False
    for i in range(1, mask.dim() + 1):
        if mask.size(-i) != 1 and mask.size(-i) != attn_logits.size(-i):
            return False
    return True


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
    """Evolves a layer's attention map from the one before (paper, section 3).

    Args:
        attn_logits: this layer's logits before the softmax, scaled, (B, H, T, S); finite.
        prev_attn_logits: the map the layer before handed on, same shape and dtype.
        weight: (H, H, K, K), K odd; None is no convolution.
        bias: (H,).
        alpha: weight of the previous map, in [0, 1]; a tensor of one element if learned.
        beta: weight of the convolution, in [0, 1]; likewise.
        window: "bidirectional" (centred), "causal" (earlier queries and keys alone, for a
            decoder's self-attention) or "cross" (earlier queries, centred keys, for
            encoder-decoder attention).
        mask: bool, broadcastable to (B, H, T, S); True where a cell does not exist, because
            its query or key is padding or its key lies in the query's future.

    Returns:
        The evolved map before the softmax, (B, H, T, S), finite everywhere; the mask is yet to
        be applied to it for the softmax.

    Raises:
        ValueError: shapes, the dtypes of the maps or of the mask, a number or `window` do not fit.
    """
    check_maps(attn_logits, prev_attn_logits, mask, attn_logits.size(1))
    check_window(window)
    check_weights(weight, bias, alpha, beta, attn_logits.size(1))
    return mix_and_refine(attn_logits, prev_attn_logits, weight, bias, alpha, beta, window, mask)


def check_weights(
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    heads: int,
) -> None:
    """Raises ValueError, naming the argument, unless these fit each other and the heads."""
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be given, or neither")
    if weight is not None and bias is not None:
        kernel_size = weight.size(-1) if weight.dim() == 4 else 0
        if weight.shape != (heads, heads, kernel_size, kernel_size) or bias.shape != (heads,):
            raise ValueError(
                f"weight must be ({heads}, {heads}, K, K) and bias ({heads},) for {heads} heads, "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        check_kernel_size("kernel_size", kernel_size)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, Tensor):
            check_unit_interval(name, value)
        elif value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one, got shape {value.shape}")


def check_unit_interval(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1]."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def check_kernel_size(name: str, value: int) -> None:
    """Raises ValueError unless `value` is odd and positive."""
    if not isinstance(value, Integral) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be odd and positive (1, 3, 5, ...), got {value!r}")


def check_window(window: str) -> None:
    """Raises ValueError unless `window` is one of WINDOWS."""
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {window!r}")


def step(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    window: str,
    mask: Optional[Tensor],
    rows: Optional[Tensor],
) -> Tuple[Tensor, Optional[Tensor]]:
    """:func:`evolve` for the next T queries of a sequence ("causal" and "cross" windows).

    `rows` are the last K - 1 rows of A_in before these queries, (B, H, K - 1, S or fewer), None
    at the start. Returns the evolved map, (B, H, T, S), and the rows for the queries to come.

    Raises:
        ValueError: `rows` are of another kernel size, or of more keys than the map has.
    """
    a_in = mix(attn_logits, prev_attn_logits, alpha, mask)
    if weight is None or bias is None:
        return a_in, None
    count = weight.size(2) - 1
    if rows is None:
        rows = a_in.new_zeros([a_in.size(0), a_in.size(1), count, a_in.size(3)])
    else:
        if rows.size(2) != count or rows.size(3) > a_in.size(3):
            raise ValueError(
                f"rows must be (batch, heads, {count}, {a_in.size(3)} or fewer), got {rows.shape}"
            )
        # To earlier queries the keys that came since are the future: masked, zero.
        rows = F.pad(rows, (0, a_in.size(3) - rows.size(3)))
    evolved = refine(a_in, weight, bias, beta, window, rows)
    rows = torch.cat([rows, a_in], dim=2)
    return evolved, rows[:, :, rows.size(2) - count :]
