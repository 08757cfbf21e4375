"""Measures how far attention moves from layer to layer."""

import math
from typing import List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from evolving_attention import AttentionMap


class Movement(NamedTuple):
    """Measures of one attention, averaged over the queries.

    Attributes:
        name: of the attention in the model.
        entropy: of each head's probabilities, in bits, (heads,).
        distance: of each head's map from that of the same head in the previous layer, (heads,);
            None in the first layer and where the size of maps changes.
        mean_distance: of the map averaged over the heads from the previous one, (). Use it for
            comparisons with a plain model, whose heads have no order.
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

    The square root of the divergence in bits: 0 for equal probabilities, 1 for those that have no
    key in common.
    """
    both = entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2
    return both.clamp(min=0).sqrt()


def movement(maps: Sequence[AttentionMap]) -> List[Movement]:
    """Measures of attentions that follow each other in a stack.

    They are averages over batch and queries, so no query may be padding: give sentences of one
    length.
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


def rollout(maps: Sequence[AttentionMap]) -> List[AttentionMap]:
    """Attention rollout (Abnar and Zuidema, 2020): how far each layer's tokens come from the input.

    Each layer adds its input to what it attends to, so the mean of the heads counts half and the
    token itself the other half; these matrices are multiplied from the first layer on. With
    evolving attention, the evolved maps are what is multiplied.

    Returns:
        One map of one head for each layer, (batch, 1, tokens, tokens), the product up to it;
        attn_logits are the logarithms.

    Raises:
        ValueError: not all maps are of the same tokens.
    """
    found: List[AttentionMap] = []
    for name, _, attn_probs in maps:
        probs = attn_probs.detach().double().mean(dim=1, keepdim=True)
        if probs.shape[-1] != probs.shape[-2] or (found and found[0][2].shape != probs.shape):
            raise ValueError(
                "rollout needs self-attention over the same tokens in every layer; "
                f"{name} is {tuple(attn_probs.shape)}"
            )
        mixed = (probs + torch.eye(probs.size(-1)).to(probs)) / 2
        rolled = mixed @ found[-1].attn_probs if found else mixed
        found.append(AttentionMap(name, rolled.log(), rolled))
    return found


def table(movements: Sequence[Movement]) -> str:
    """The measures as a Markdown table, one line per layer."""
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
