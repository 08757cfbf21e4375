"""Collects the attention maps of a model from any toolkit."""

import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn


class AttentionMap(NamedTuple):
    """The map of one attention in one forward pass.

    Attributes:
        name: of the attention in the model, as in `named_modules`.
        attn_logits: the map that is handed on, before mask and softmax, (batch, heads, queries,
            keys).
        attn_probs: the probabilities before dropout, same shape; 0 where a mask hides a key.
    """

    name: str
    attn_logits: Tensor
    attn_probs: Tensor


class AttentionProbe(nn.Module):
    """Returns the probabilities unchanged; :func:`collect_maps` reads them here.

    Every attention of this project has one, called `probe`, right after its softmax.
    """

    def forward(self, attn_probs: Tensor, attn_logits: Tensor) -> Tensor:
        return attn_probs

    @torch.jit.unused
    def watched(self) -> bool:
        """Whether maps are being collected."""
        return len(self._forward_hooks) > 0


@contextmanager
def collect_maps(model: nn.Module) -> Iterator[List[AttentionMap]]:
    """Collects the maps of every forward pass inside a ``with`` block::

        with torch.no_grad(), collect_maps(model) as maps:
            model(images)
        for name, attn_logits, attn_probs in maps: ...

    Each attention adds its map when it runs, so one pass gives one map of each, in their order. The
    model's output does not change. What other threads run meanwhile is not collected. Maps are the
    model's own tensors: gradients flow through them unless torch.no_grad() is on. Switch activation
    checkpointing off, which runs a layer twice.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` has no attention of this project, or did not run one in the block.
    """
    if not isinstance(model, nn.Module):
        inside = "; pass its network_" if hasattr(model, "network_") else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{inside}")
    maps: List[AttentionMap] = []
    thread = threading.get_ident()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(probe: nn.Module, args: Tuple[Any, ...], attn_probs: Tensor) -> None:
            if threading.get_ident() == thread:
                maps.append(AttentionMap(name, args[1], attn_probs))

        return hook

    probes = [(name, m) for name, m in model.named_modules() if isinstance(m, AttentionProbe)]
    if not probes:
        raise ValueError(
            f"model must have attentions of this project, and not be scripted; {type(model)} has "
            "none. A plain model's weights fit the evolving one with alpha = beta = 0"
        )
    handles = [
        probe.register_forward_hook(hook_of(name.rpartition(".")[0])) for name, probe in probes
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        raise ValueError(
            "model did not run inside the with block, or ran as compiled by torch.compile before "
            "it: run the model itself inside the block"
        )
