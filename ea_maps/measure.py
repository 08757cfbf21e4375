"""How far attention moves from layer to layer, in numbers."""

import math
from typing import List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from evolving_attention import AttentionMap


class Movement(NamedTuple):
    """What an attention does, on average over the queries.

    Attributes:
        name: of the attention in the model.
        entropy: of each head's probabilities, in bits, (heads,).
        distance: of each head's map from the same head's in the layer before, (heads,); None in
            the first layer, and where maps change their size.
        mean_distance: of the map averaged over the heads, from the one before, (); it is the fair
            one for a plain model, whose heads are in no order.
    """

    name: str
    entropy: Tensor
    distance: Optional[Tensor]
    mean_distance: Optional[Tensor]


def entropy(attn_probs: Tensor) -> Tensor:
    """Entropy over the keys, in bits: (..., queries, keys) -> (..., queries)."""
    return torch.special.entr(attn_probs).sum(dim=-1) / math.log(2)


def js_distance(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon distance over the keys: (..., queries, keys) twice -> (..., queries).

    The square root of the divergence in bits, so 0 for the same probabilities and 1 for those
    that have no key in common.
    """
    both = entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2
    return both.clamp(min=0).sqrt()


def movement(maps: Sequence[AttentionMap]) -> List[Movement]:
    """Entropy and movement of attentions that follow each other in a stack, layer by layer.

    Their maps are averaged over batch and queries, so all queries must be real: give sentences of
    one length.
    """
    found: List[Movement] = []
    before: Optional[Tensor] = None
    for name, _, attn_probs in maps:
        probs = attn_probs.detach().double()
        distance = mean_distance = None
        if before is not None and before.shape == probs.shape:
            distance = js_distance(before, probs).mean(dim=(0, 2))
            mean_distance = js_distance(before.mean(dim=1), probs.mean(dim=1)).mean()
        found.append(Movement(name, entropy(probs).mean(dim=(0, 2)), distance, mean_distance))
        before = probs
    return found


def table(movements: Sequence[Movement]) -> str:
    """The figures as a Markdown table, a line a layer."""
    lines = [
        "| attention | entropy (bits) | distance, head by head | distance, mean of heads |",
        "|---|---|---|---|",
    ]
    for name, bits, distance, mean_distance in movements:
        moved = ["", ""]
        if distance is not None and mean_distance is not None:
            moved = [f"{distance.mean():.3f}", f"{mean_distance:.3f}"]
        lines.append(f"| {name} | {bits.mean():.2f} | {' | '.join(moved)} |")
    return "\n".join(lines)
