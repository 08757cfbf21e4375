"""Attention for a part of the batch at a time: how a CPU runs large ones without gradients."""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

# From this size on glibc maps every new tensor anew and the system clears each of its pages, which
# costs as much time as what is done to it; smaller ones find memory that was in use before.
MAPPED = 32 * 2**20  # bytes
LARGE = MAPPED  # of all maps together
CELLS = 1_000_000  # of the maps of a part


def in_pieces(
    attend: Callable[..., Tuple[Tensor, ...]],
    cells: int,
    tensors: Tuple[Optional[Tensor], ...],
    *others: Any,
    module: nn.Module,
) -> Tuple[Tensor, ...]:
    """``attend(*tensors, *others)``, for a part of the batch at a time if its maps are large.

    Args:
        attend: an attention; treats the examples of a batch alone, and returns tensors of them.
        cells: of one example's map, heads * queries * keys.
        tensors: of the whole batch, their first dimension, or None.
        others: masks, of the whole batch if they have 4 dimensions and the first is not 1, and
            what else `attend` takes.
        module: whose attention it is. A hook on a module in there must see the whole batch.
    """
    if not _large(cells, tensors[0]) or _hooked(module):
        return attend(*tensors, *others)
    batch = tensors[0].size(0)
    masks = [x for x in others if isinstance(x, Tensor) and x.dim() >= 4 and x.size(0) != 1]
    if any(x is not None and x.size(0) != batch for x in (*tensors, *masks)):
        return attend(*tensors, *others)  # and let it say what is wrong
    count = max(1, CELLS // cells)
    results: Tuple[Tensor, ...] = ()
    for start in range(0, batch, count):
        piece = slice(start, start + count)
        parts = attend(
            *(x if x is None else x[piece] for x in tensors),
            *(x[piece] if any(x is mask for mask in masks) else x for x in others),
        )
        if not results:
            results = tuple(part.new_empty((batch, *part.shape[1:])) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[piece] = part
    return results


def _large(cells: int, first: Tensor) -> bool:
    if torch.is_grad_enabled() or in_graph() or not isinstance(first, Tensor):  # a proxy of fx
        return False
    if not first.is_cpu or torch._C._are_functorch_transforms_active():
        return False
    example = cells * first.element_size()
    return example < MAPPED and first.size(0) * example >= LARGE


def _hooked(module: nn.Module) -> bool:
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    inner = (m for m in module.modules() if m is not module)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)


def in_graph() -> bool:
    """Whether operations are being recorded, for inputs of any size."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
