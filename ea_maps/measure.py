"""Measures how far attention moves from layer to layer, and how much of the input it reaches."""

import math
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor, nn

from evolving_attention import AttentionEvolution, AttentionMap

UNIT = 10**9  # scipy computes flows of whole numbers
FLOW_COST = 10**9  # edges that all flows pass by at most: about a minute


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


def kind_of(model: nn.Module) -> str:
    """ "evolving" or "plain", as a model with alpha = beta = 0 is."""
    evolutions = [x for x in model.modules() if isinstance(x, AttentionEvolution)]
    evolves = any(x.learnable or x.mixing != (0.0, 0.0) for x in evolutions)
    return "evolving" if evolves else "plain"


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


def with_residuals(maps: Sequence[AttentionMap]) -> List[Tensor]:
    """What each layer's tokens are made of, (batch, tokens, tokens).

    A layer adds its input to what it attends to, so the mean of the heads counts half, and the
    token itself the other half. With evolving attention, the evolved maps are what counts.
    """
    found: List[Tensor] = []
    for name, _, attn_probs in maps:
        probs = attn_probs.detach().double().cpu().mean(dim=1)
        if probs.size(1) != probs.size(2) or (found and found[0].shape != probs.shape):
            raise ValueError(
                "rollout and flow need self-attention over the same tokens in every layer; "
                f"{name} has maps of {probs.size(1)} x {probs.size(2)}"
            )
        found.append((probs + torch.eye(probs.size(1)).to(probs)) / 2)
    return found


def as_maps(maps: Sequence[AttentionMap], probs: Sequence[Tensor]) -> List[AttentionMap]:
    """Maps of one head with the names of `maps`; attn_logits are the logarithms."""
    pairs = zip(maps, (x.unsqueeze(1) for x in probs), strict=True)
    return [AttentionMap(attention.name, x.log(), x) for attention, x in pairs]


def rollout(maps: Sequence[AttentionMap]) -> List[AttentionMap]:
    """Attention rollout: how much of each layer's tokens comes from which token of the input.

    The product of :func:`with_residuals` from the first layer on (Abnar and Zuidema, "Quantifying
    Attention Flow in Transformers", 2020, section 3).

    Returns:
        One map of one head for each layer, (batch, 1, tokens, tokens): the product up to it.

    Raises:
        ValueError: not all maps are of the same tokens.
    """
    found: List[Tensor] = []
    for mixed in with_residuals(maps):
        found.append(mixed @ found[-1] if found else mixed)
    return as_maps(maps, found)


def flow(maps: Sequence[AttentionMap]) -> List[AttentionMap]:
    """Attention flow: how much could pass from each token of the input to a layer's tokens.

    The maximum flow in the graph of all tokens of all layers, whose edges hold at most what
    :func:`with_residuals` says (Abnar and Zuidema, 2020, section 3). As in the authors' code, the
    flows of a token are divided by their sum.

    Returns:
        One map of one head for each layer, (batch, 1, tokens, tokens).

    Raises:
        ValueError: not all maps are of the same tokens, or there are too many of them.
    """
    layers = with_residuals(maps)
    batch, tokens, _ = layers[0].shape
    if batch * tokens**4 * len(layers) * (len(layers) + 1) / 2 > FLOW_COST:
        raise ValueError(
            f"flow takes too long for {tokens} tokens in {len(layers)} layers; use rollout, or "
            "fewer tokens"
        )
    found = [torch.zeros_like(layer) for layer in layers]
    for case in range(batch):
        capacities = [(UNIT * layer[case]).int().numpy() for layer in layers]
        for number in range(len(layers)):
            found[number][case] = flow_of(capacities[: number + 1])
    return as_maps(maps, [flows / flows.sum(dim=2, keepdim=True) for flows in found])


def flow_of(capacities: Sequence[np.ndarray]) -> Tensor:
    """Maximum flows from the last layer's tokens to those of the input, (tokens, tokens).

    A node of the graph is a token of a layer: number `layer * tokens + token`, the input first.
    """
    tokens, depth = len(capacities[0]), len(capacities)
    queries, keys = np.indices((tokens, tokens))
    edges = (
        np.concatenate([((layer + 1) * tokens + queries).ravel() for layer in range(depth)]),
        np.concatenate([(layer * tokens + keys).ravel() for layer in range(depth)]),
    )
    weights = np.concatenate([layer.ravel() for layer in capacities])
    size = (depth + 1) * tokens
    graph = csr_array((weights, edges), shape=(size, size))
    flows = [
        [maximum_flow(graph, depth * tokens + query, key).flow_value for key in range(tokens)]
        for query in range(tokens)
    ]
    return torch.tensor(flows, dtype=torch.float64) / UNIT


SUMMARIES: Dict[str, Callable[[Sequence[AttentionMap]], List[AttentionMap]]] = {
    "rollout": rollout,
    "flow": flow,
}


def by_attention(
    maps: Sequence[AttentionMap], attentions: Mapping[str, Tuple[str, Union[str, Tuple[str, ...]]]]
) -> Dict[str, List[AttentionMap]]:
    """The maps of each kind of attention that there is.

    `attentions` has how the names of its modules begin and end.
    """
    found = {
        attention: [x for x in maps if x.name.startswith(start) and x.name.endswith(end)]
        for attention, (start, end) in attentions.items()
    }
    return {attention: layers for attention, layers in found.items() if layers}


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
