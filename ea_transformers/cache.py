"""The rows of earlier maps that incremental decoding needs, kept in transformers' cache."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from evolving_attention import AttentionEvolution
from evolving_attention.functional import mix

# Assisted decoding takes back the candidates that the model refuses, up to this many.
CROPPABLE = 32


class RowsLayer(DynamicLayer):
    """The last rows of one attention's A_in, which the convolution of the next step reads.

    It stands behind the layers of keys and values in a cache, and is reordered, cropped and reset
    together with them.

    Attributes:
        attention: the layer's index and the convolution's window.
        keys: the rows, (batch, heads, K - 1 + CROPPABLE or fewer, keys).
    """

    supports_early_init = False

    def __init__(self, layer_idx: int, window: str) -> None:
        super().__init__()
        self.attention = (layer_idx, window)
        self.reach = 0

    def step(
        self,
        evolution: AttentionEvolution,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        absent: Optional[Tensor],
    ) -> Tensor:
        """The evolved map of the next queries; arguments as in :meth:`AttentionEvolution.step`."""
        width = attn_logits.size(3)
        self.reach = evolution.kernel_size - 1
        rows = None
        if self.is_initialized:
            rows = self.keys[:, :, self.keys.size(2) - self.reach :, :width]
        evolved, _ = evolution.step(attn_logits, prev_attn_logits, absent, rows)
        alpha, _ = evolution.mixing_weights(attn_logits)
        self.keep(mix(attn_logits, prev_attn_logits, alpha, absent))
        return evolved

    def keep(self, a_in: Tensor) -> None:
        """Adds rows (batch, heads, queries, keys), and drops those that are no longer needed."""
        if self.is_initialized:
            rows = self.keys[..., : a_in.size(3)]
            rows = F.pad(rows, (0, a_in.size(3) - rows.size(3)))
        else:
            rows = a_in.new_zeros(a_in.size(0), a_in.size(1), self.reach, a_in.size(3))
        rows = torch.cat([rows, a_in], dim=2)
        self.device = a_in.device
        self.keys = rows[:, :, -(self.reach + CROPPABLE) :]
        self.values = self.keys[..., :0]  # the methods of the base class treat both alike
        self.is_initialized = True

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers.

        Raises:
            ValueError: not enough rows are left.
        """
        if self.is_initialized and self.keys.size(2) + tokens_to_remove < self.reach:
            raise ValueError(
                f"a cache of evolving attention can be cropped by at most {CROPPABLE} tokens, "
                f"since it keeps only the last rows of each map, got {tokens_to_remove}"
            )
        super().crop(tokens_to_remove)


def rows_layer(
    cache: Cache, layer_idx: int, window: str, num_layers: int, query_length: int
) -> RowsLayer:
    """The rows of one attention in a cache of any kind; it adds them at the start of decoding.

    Args:
        cache: transformers' cache of keys and values.
        layer_idx: of the attention.
        window: "causal" or "cross".
        num_layers: of the decoder.
        query_length: new tokens of this step.

    Raises:
        ValueError: the cache holds tokens already, but not the rows of their maps.
    """
    # Rows follow the decoder's tokens; keys and values of cross-attention do not.
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    for layer in cache.layers[num_layers:]:
        if layer.attention == (layer_idx, window):
            return layer
    past = cache.get_seq_length(layer_idx)
    if window == "cross":  # self-attention has added its tokens before
        past = past - query_length
    if past > 0:
        raise ValueError(
            f"cache holds {int(past)} tokens, but not the rows of their attention maps: it must be "
            "empty at first, or have been filled by this model. Prefix tuning cannot be used"
        )
    while len(cache.layers) < num_layers:  # they are made as needed, each at its own index
        cache.layers.append(cache.layer_class_to_replicate())
    layer = RowsLayer(layer_idx, window)
    cache.layers.append(layer)
    return layer
