"""Checks of arguments, and of whether values can be checked (:func:`in_graph`).

Each check raises ValueError, naming the argument and what would be right.
"""

import math
from numbers import Integral, Real
from typing import Optional, Union

import torch
from torch import Tensor

WINDOWS = ("bidirectional", "causal", "cross")
# Numbers that mask logits, added to them or written in their place: -inf, the lowest number of a
# dtype and -1e9 lie below MASKED, and -1e4 plus a logit within MASKED_BY_10_000. The logits of a
# training that diverges may lie in between.
MASKED = -6e4
MASKED_BY_10_000 = (-1.01e4, -9.9e3)


def check_maps(attn_logits: Tensor, prev_attn_logits: Tensor, mask: Optional[Tensor]) -> None:
    """The maps are (batch, heads, queries, keys) and match, and the mask fits them."""
    if prev_attn_logits is None:
        raise ValueError(
            "prev_attn_logits must be the map of the previous layer, got None: the first layer, "
            "which has none, needs no evolution"
        )
    if not isinstance(attn_logits, Tensor):
        raise ValueError(f"attn_logits must be a tensor, got {type(attn_logits).__name__}")
    if not isinstance(prev_attn_logits, Tensor):
        raise ValueError(
            f"prev_attn_logits must be a tensor, got {type(prev_attn_logits).__name__}"
        )
    if attn_logits.dim() != 4:
        raise ValueError(
            f"attn_logits must be (batch, heads, queries, keys), got shape {attn_logits.shape}"
        )
    if not attn_logits.is_floating_point():
        raise ValueError(f"attn_logits must have a floating-point dtype, got {attn_logits.dtype}")
    if prev_attn_logits.shape != attn_logits.shape:
        raise ValueError(
            f"prev_attn_logits has shape {prev_attn_logits.shape}, attn_logits "
            f"{attn_logits.shape}: they must have the same batch, heads, queries and keys"
        )
    check_dtype("prev_attn_logits", prev_attn_logits, attn_logits)
    if mask is not None:
        check_mask("mask", mask, attn_logits)


def check_mask(name: str, mask: Tensor, attn_logits: Tensor) -> None:
    """The mask is bool and broadcastable to the map without enlarging it."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be a tensor of dtype torch.bool, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be of dtype torch.bool (True: no cell), got {mask.dtype}")
    if not expands_to(mask, attn_logits):
        raise ValueError(
            f"{name} must be broadcastable to {attn_logits.shape}, got shape {mask.shape}"
        )


def expands_to(mask: Tensor, attn_logits: Tensor) -> bool:
    """Whether the mask is broadcastable to the map without enlarging it."""
    if mask.dim() > attn_logits.dim():
        return False
    for i in range(1, mask.dim() + 1):
        if mask.size(-i) != 1 and mask.size(-i) != attn_logits.size(-i):
            return False
    return True


def can_be_read(attn_logits: Tensor) -> bool:
    """Whether values can be looked at: the tensor holds some, and no operation is being recorded.

    Python is asked for the type, since torch.fx traces with objects that only look like tensors.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    if type(attn_logits) is not Tensor or attn_logits.is_meta or attn_logits.numel() == 0:
        return False
    if attn_logits.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not (
        torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    )


def check_unmasked(
    attn_logits: Tensor, prev_attn_logits: Tensor, mask: Optional[Tensor], learnable: bool
) -> None:
    """The maps do not hold the low numbers that mask logits for a softmax.

    The convolution would spread these over the map. Where `mask` is True they do no harm, apart
    from the gradient of a learned alpha, which -inf makes NaN. Only the first, the middle and the
    last query are looked at, so that this takes no time: padding, the future and windows hide keys
    from at least one of them. Equally large positive numbers, or numbers halfway to a mask, show
    that the training has diverged instead.
    """
    for name, logits in (
        ("attn_logits", attn_logits),
        ("prev_attn_logits", prev_attn_logits),
    ):
        last = logits.size(2) - 1
        seen = logits.detach()[:, :, [0, last // 2, last]]  # (B, H, 3, S)
        lowest = seen.amin().item()
        if not is_mask(lowest):
            continue
        if mask is not None and not (learnable and math.isinf(lowest)):
            seen = seen.masked_fill(mask.expand(logits.shape)[:, :, [0, last // 2, last]], 0.0)
            lowest = seen.amin().item()
        halfway = (seen > MASKED_BY_10_000[1]) & (seen < MASKED_BY_10_000[1] / 10)
        diverged = seen.amax().item() >= -MASKED_BY_10_000[1] or bool(halfway.any())
        if is_mask(lowest) and not diverged:
            raise ValueError(
                f"{name} must not be masked yet, but holds {lowest:g}: pass the logits as they are "
                "before a mask; tell which cells do not exist by mask=... (bool, True: no cell); "
                "and mask the result for the softmax, but not the map that you hand on"
            )


def is_mask(number: float) -> bool:
    """Whether a logit is as low as those that are masked."""
    return number <= MASKED or MASKED_BY_10_000[0] <= number <= MASKED_BY_10_000[1]


def check_heads(attn_logits: Tensor, num_heads: int) -> None:
    """The map has as many heads as the layer."""
    if attn_logits.size(1) != num_heads:
        raise ValueError(
            f"attn_logits has {attn_logits.size(1)} heads, this layer was made with "
            f"num_heads={num_heads}"
        )


def check_rows(rows: Tensor, count: int, a_in: Tensor) -> None:
    """The rows kept from earlier steps fit the kernel and the map."""
    batch, heads, keys = a_in.size(0), a_in.size(1), a_in.size(3)
    fit = rows.dim() == 4 and list(rows.shape[:3]) == [batch, heads, count]
    if not fit or rows.size(3) > keys:
        raise ValueError(
            f"rows must be (batch, heads, K - 1, keys) = ({batch}, {heads}, {count}, {keys} or "
            f"fewer), got {rows.shape}: they are what step() returned, reordered with the cache"
        )
    if rows.dtype != a_in.dtype:
        raise ValueError(
            f"rows has dtype {rows.dtype}, the map {a_in.dtype}: they must be the same"
        )


def check_weights(
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    attn_logits: Tensor,
) -> None:
    """The weights fit each other and the map, and alpha and beta are in range."""
    heads = attn_logits.size(1)
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
        dtypes = (weight.dtype, bias.dtype, attn_logits.dtype)
        # Autocast casts all of them, unless one is of double precision.
        device = attn_logits.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if torch.float64 in dtypes or not autocast:
            check_dtype("weight", weight, attn_logits)
            check_dtype("bias", bias, attn_logits)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, Tensor):
            check_unit_interval(name, value)
        elif value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one, got shape {value.shape}")


def check_dtype(name: str, value: Tensor, attn_logits: Tensor) -> None:
    """The tensor has the map's dtype."""
    if value.dtype != attn_logits.dtype:
        raise ValueError(
            f"{name} has dtype {value.dtype}, attn_logits {attn_logits.dtype}: they must be the "
            "same"
        )


def check_options(alpha: float, beta: float, kernel_size: int) -> None:
    """The options of a layer or model are in range."""
    check_unit_interval("alpha", alpha)
    check_unit_interval("beta", beta)
    check_kernel_size("kernel_size", kernel_size)


def check_unit_interval(name: str, value: float) -> None:
    """The number lies in [0, 1]."""
    if not is_a(Real, value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def check_kernel_size(name: str, value: int) -> None:
    """The number is odd and positive."""
    if not is_a(Integral, value) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be odd and positive (1, 3, 5, ...), got {value!r}")


def check_count(name: str, value: int) -> None:
    """The number is a positive integer."""
    if not is_a(Integral, value) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """The value is True or False, not a string."""
    if type(value).__name__ not in ("bool", "bool_"):  # bool_ is NumPy's, as in a grid of options
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_window(window: str) -> None:
    """The window is one of WINDOWS."""
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {window!r}")


def is_a(kind: type, value: object) -> bool:
    """Whether the value is a number of this kind; True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def in_graph() -> bool:
    """Whether operations are being recorded, for inputs whose sizes may change."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
