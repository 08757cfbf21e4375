"""The attention function of the ``ea_*`` models, which takes and returns a map.

transformers' attention modules call the function that is registered under the name in
`attn_implementation`, and hand all their keyword arguments on to it. So the map of the previous
layer comes in as one of these, and the layer's own goes out beside the probabilities.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ea_transformers.cache import LayerWithRows
from ea_transformers.configuration import NAME, EvolvingConfig
from evolving_attention import AttentionEvolution, AttentionProbe


class AttentionMaps(NamedTuple):
    """What takes the place of the probabilities among an attention function's results.

    Attributes:
        attn_probs: after dropout, as transformers' eager attention returns them, (batch, heads,
            queries, keys).
        attn_logits: the map to hand on, same shape.
    """

    attn_probs: Tensor
    attn_logits: Tensor


def add_evolution(
    attention: nn.Module, config: EvolvingConfig, num_heads: int, evolves: bool, window: str
) -> None:
    """Gives a module of transformers' what :func:`evolving_attention_forward` uses.

    Args:
        attention: gets `evolution`, which is None for a map that does not evolve; `probe`; and
            `window`, that of the convolution.
        evolves: whether there is a previous map, and it should be used.
    """
    attention.window = window
    attention.evolution = None
    if evolves and config.evolution:
        evolution = AttentionEvolution(num_heads, window=window, **config.evolution)
        # Fixed alpha and beta are buffers in float32, whatever the default dtype is.
        attention.evolution = evolution.to(torch.get_default_dtype())
    attention.probe = AttentionProbe()


def evolving_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    scaling: float,
    dropout: float = 0.0,
    position_bias: Optional[Tensor] = None,
    prev_attn_logits: Optional[Tensor] = None,
    padded_queries: Optional[Tensor] = None,
    rows: Optional[LayerWithRows] = None,
    **kwargs: Any,
) -> Tuple[Tensor, AttentionMaps]:
    """As transformers' eager attention, except for the maps.

    Args:
        module: an attention that :func:`add_evolution` has prepared.
        query, key, value: (batch, heads, queries or keys, head_dim).
        attention_mask: numbers to add to the logits, or bool, True where a query sees a key;
            broadcastable to (batch, heads, queries, keys). Cells with -1e4 or less do not exist
            for the convolution.
        position_bias: part of the logits, broadcastable likewise.
        prev_attn_logits: the map of the previous layer, (batch, heads, queries, keys).
        padded_queries: True for queries that are padding, broadcastable likewise. Where the window
            is bidirectional, they follow from the mask: no query sees them as keys.
        rows: of the maps of earlier steps, in incremental decoding.

    Raises:
        ValueError: the layer evolves the map of the previous layer, which is missing.
    """
    if not hasattr(module, "probe"):
        raise ValueError(
            f"attn_implementation='{NAME}' is for the ea_* models, not for {type(module).__name__}"
        )
    attn_logits = torch.matmul(query, key.transpose(2, 3)) * scaling
    if position_bias is not None:
        attn_logits = attn_logits + position_bias
    if module.evolution is not None:
        if prev_attn_logits is None:
            raise ValueError(
                "this attention evolves the map of the previous layer, which was not handed on to "
                "it; the first layer of a stack must have `evolution = None`"
            )
        absent = absent_cells(attention_mask, padded_queries, module.window)
        if rows is not None:
            attn_logits = rows.step(module.evolution, attn_logits, prev_attn_logits, absent)
        else:
            attn_logits = module.evolution(attn_logits, prev_attn_logits, absent)

    scores = attn_logits
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    attn_probs = module.probe(scores.softmax(dim=-1), attn_logits)
    attn_probs = F.dropout(attn_probs, p=dropout, training=module.training)
    output = torch.matmul(attn_probs, value).transpose(1, 2).contiguous()
    return output, AttentionMaps(attn_probs, attn_logits)


def absent_cells(
    attention_mask: Optional[Tensor], padded_queries: Optional[Tensor], window: str
) -> Optional[Tensor]:
    """True for cells of the map that do not exist: query or key is padding, or in the future."""
    if attention_mask is None:
        return padded_queries
    hidden = hidden_cells(attention_mask)
    if window == "bidirectional":
        padded_queries = hidden.all(dim=-2, keepdim=True).transpose(-2, -1)
    return hidden if padded_queries is None else hidden | padded_queries


def hidden_cells(attention_mask: Tensor) -> Tensor:
    """True where a mask, bool or to be added, hides a key from a query."""
    return ~attention_mask if attention_mask.dtype == torch.bool else attention_mask <= -1e4


AttentionInterface.register(NAME, evolving_attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)
