"""Attention for a part of the batch at a time: how a CPU runs large ones without gradients."""

from typing import Any, Callable, Tuple

import torch
from torch import Tensor, nn

# From this size on glibc maps every new tensor anew and the system clears each of its pages, which
# costs as much time as what is done to it; smaller ones find memory that was in use before.
LARGE = 32 * 2**20  # bytes of all maps
CELLS = 1_000_000  # of the maps of a part


def in_pieces(
    attend: Callable[..., Tuple[Tensor, ...]], cells: int, *args: Any, module: nn.Module
) -> Tuple[Tensor, ...]:
    """``attend(*args)``, for a part of the batch at a time if the maps are large.

    Args:
        attend: an attention; treats the examples of a batch alone, and returns tensors of them.
        cells: of one example's map, heads * queries * keys.
        args: of `attend`. The first is a tensor of the whole batch, as are all others of at least
            4 dimensions of which the first is as long; the parts share what else there is.
        module: whose attention it is. A hook in there must see the whole batch.

    Returns:
        What `attend` does, contiguous.
    """
    if not _large(cells, args[0]) or _hooked(module):
        return attend(*args)
    batch = args[0].size(0)
    count = max(1, CELLS // cells)
    results: Tuple[Tensor, ...] = ()
    for start in range(0, batch, count):
        piece = slice(start, start + count)
        parts = attend(*(_part(arg, piece, batch) for arg in args))
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
    return first.size(0) * cells * first.element_size() >= LARGE


def _hooked(module: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def _part(arg: Any, piece: slice, batch: int) -> Any:
    if isinstance(arg, Tensor) and arg.dim() >= 4 and arg.size(0) == batch:
        return arg[piece]
    return arg


def in_graph() -> bool:
    """Whether operations are being recorded, for inputs of any size."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
