"""The two equations of evolving attention, as the models run them."""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

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
    batch = attn_logits.size(0)
    count = _piece(attn_logits, prev_attn_logits, weight)
    if count >= batch:
        a_in = mix(attn_logits, prev_attn_logits, alpha, mask)
        return refine(a_in, weight, bias, beta, window).contiguous()
    evolved = torch.empty_like(attn_logits)
    for start in range(0, batch, count):
        end = min(start + count, batch)
        cells = mask
        if mask is not None and mask.dim() == 4 and mask.size(0) == batch:
            cells = mask[start:end]
        a_in = mix(attn_logits[start:end], prev_attn_logits[start:end], alpha, cells)
        evolved[start:end] = refine(a_in, weight, bias, beta, window)
    return evolved


def _piece(attn_logits: Tensor, prev_attn_logits: Tensor, weight: Optional[Tensor]) -> int:
    """How many maps to evolve at a time.

    Without gradients, on a CPU, as many as a cache holds with all that is between the two
    equations: memory that is new to the process costs as much time as what is done to it.
    """
    batch = attn_logits.size(0)
    if torch.jit.is_scripting() or attn_logits.is_cuda or weight is None or _in_graph():
        return batch
    tensors = (attn_logits, prev_attn_logits, weight)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return batch
    if torch._C._are_functorch_transforms_active() or attn_logits.numel() <= 1_000_000:
        return batch
    return max(1, 500_000 * batch // attn_logits.numel())


def mix(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    alpha: Union[float, Tensor],
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Equation 1: A_in = alpha * A^{k-1} + (1 - alpha) * logits, zero where `mask` is True."""
    a_in = attn_logits
    if isinstance(alpha, Tensor) or alpha > 0:
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
    if not isinstance(beta, Tensor) and beta == 1.0:
        return refined
    return _lerp(a_in, refined, beta)


def _lerp(start: Tensor, end: Tensor, weight: Union[float, Tensor]) -> Tensor:
    if isinstance(weight, Tensor):  # TorchScript chooses the overload by the type
        return torch.lerp(start, end, weight)
    return torch.lerp(start, end, weight)


def _relu_conv(
    a_in: Tensor, weight: Tensor, bias: Tensor, window: str, rows: Optional[Tensor]
) -> Tensor:
    keys = a_in.size(3)
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
    if _in_graph():
        return F.conv2d(a_in, weight, bias, padding=padding).relu_()
    if weight.size(0) > 8:
        return _relu(F.conv2d(a_in, weight, bias, padding=padding))
    return _relu_conv_by_pairs(a_in, weight, bias, padding, keys)


def _relu_conv_by_pairs(
    a_in: Tensor, weight: Tensor, bias: Tensor, padding: Tuple[int, int], keys: int
) -> Tensor:
    """Computes the heads of two neighbouring keys as channels of one window a key wider.

    A CPU's vector registers hold 16 numbers, of which up to 8 heads leave half idle.
    """
    weight = torch.cat([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))])
    bias = torch.cat([bias, bias])
    odd = keys % 2  # then the first pair begins before the first key
    padding = (padding[0], padding[1] + odd)
    pairs = _relu(F.conv2d(a_in, weight, bias, stride=(1, 2), padding=padding))
    heads_last = pairs.permute(0, 2, 3, 1).reshape(a_in.size(0), pairs.size(2), -1, a_in.size(1))
    return heads_last.permute(0, 3, 1, 2)[..., odd : odd + keys]


def _heads_last(a_in: Tensor) -> bool:
    """Whether to put the heads last in memory for the convolution.

    On a CPU oneDNN's own layout for channels first wants many channels: with a map's few it takes
    two to four times as long. The smallest maps it leaves to torch's own convolution.
    """
    if a_in.is_cuda or a_in.size(1) >= 16:
        return False
    if not torch.jit.is_scripting():
        if torch._C._are_functorch_transforms_active():  # vmap knows no memory order
            return False
        if _in_graph():
            return True
    return a_in.size(0) >= 16 or a_in.numel() > 20_480


def _in_graph() -> bool:
    """Whether operations are being recorded, for maps of any size."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _relu(x: Tensor) -> Tensor:
    if torch.jit.is_scripting() or not x.requires_grad:
        return x.relu_()
    return FrugalReLU.apply(x)


class FrugalReLU(torch.autograd.Function):
    """ReLU in place, which keeps for the gradient a byte of each number, not the four of a map."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.relu_()

    @staticmethod
    def setup_context(ctx, inputs: Tuple[Tensor], output: Tensor) -> None:
        ctx.mark_dirty(*inputs)
        positive = output > 0
        ctx.save_for_backward(positive)
        ctx.save_for_forward(positive)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        # In the memory order of the mask, and so of the convolution that is next.
        return torch.where(positive, grad, 0.0)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return tangent.mul_(positive)


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
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be of dtype torch.bool (True: no such cell), got {mask.dtype}")
    if mask is not None and (mask.dim() > 4 or mask.size(-1) not in (1, attn_logits.size(3))):
        raise ValueError(
            f"mask must be broadcastable to {attn_logits.shape}, got shape {mask.shape}"
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
        ValueError: shapes, dtypes or `window` do not fit.
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
        kernel_size = weight.size(-1)
        if weight.shape != (heads, heads, kernel_size, kernel_size) or bias.shape != (heads,):
            raise ValueError(
                f"weight must be ({heads}, {heads}, K, K) and bias ({heads},) for {heads} heads, "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        check_kernel_size(kernel_size)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, Tensor):
            check_unit_interval(name, value)


def check_unit_interval(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_kernel_size(kernel_size: int) -> None:
    """Raises ValueError unless `kernel_size` is odd and positive."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive (1, 3, 5, ...), got {kernel_size}")


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
    """
    a_in = mix(attn_logits, prev_attn_logits, alpha, mask)
    if weight is None or bias is None:
        return a_in, None
    count = weight.size(2) - 1
    if rows is None:
        rows = a_in.new_zeros([a_in.size(0), a_in.size(1), count, a_in.size(3)])
    else:
        # To earlier queries the keys that came since are the future: masked, zero.
        rows = F.pad(rows, (0, a_in.size(3) - rows.size(3)))
    evolved = refine(a_in, weight, bias, beta, window, rows)
    rows = torch.cat([rows, a_in], dim=2)
    return evolved, rows[:, :, rows.size(2) - count :]
