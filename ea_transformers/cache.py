"""The rows of earlier maps that incremental decoding needs, kept in transformers' cache."""

from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from evolving_attention import AttentionEvolution
from evolving_attention.functional import refine

CROPPABLE = 64  # the tokens of that many steps can be taken back


class LayerWithRows(CacheLayerMixin):
    """A layer of a decoder's cache that also holds the last rows of its maps' A_in.

    The convolutions of the next step read them: that of self-attention and that of
    encoder-decoder attention, whose rows follow the decoder's tokens, too. They are reordered,
    cropped and reset together with the keys and values.

    It comes before transformers' class in the list of bases.

    Attributes:
        rows: by the convolution's window, (batch, heads, rows, keys): K - 1 rows, and those of the
            tokens that can be taken back.
        steps: the numbers of these tokens, step by step, likewise by window.
        reach: K - 1.
    """

    is_compileable = False  # the rows grow
    rows: Dict[str, Tensor]
    steps: Dict[str, List[int]]
    reach: int

    def step(
        self,
        evolution: AttentionEvolution,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        absent: Optional[Tensor],
    ) -> Tensor:
        """The evolved map of the next queries, as :meth:`AttentionEvolution.step` computes it."""
        batch, heads, queries, keys = attn_logits.shape
        self.reach = evolution.kernel_size - 1
        kept = self.rows.get(evolution.window)
        if kept is None:
            kept = attn_logits.new_zeros(batch, heads, self.reach, keys)
        # To earlier queries, the keys that were added since are in the future: zero. If tokens have
        # been taken back, there are fewer keys, and the negative padding crops.
        kept = F.pad(kept, (0, keys - kept.size(3)))
        last = kept[:, :, kept.size(2) - self.reach :]
        with weights_of(evolution):
            a_in, beta = evolution.mix(attn_logits, prev_attn_logits, absent)
            evolved = refine(a_in, evolution.weight, evolution.bias, beta, evolution.window, last)
        kept = torch.cat([kept, a_in], dim=2)
        # Assisted decoding takes back the tokens that the model refuses; from an assistant, also
        # the whole target, which it reads again before the next proposals.
        croppable = CROPPABLE
        if not torch.compiler.is_compiling():  # each step would be compiled anew, for its number
            steps = [*self.steps.get(evolution.window, []), queries][-CROPPABLE:]
            self.steps[evolution.window] = steps
            croppable = sum(steps)
        self.rows[evolution.window] = kept[:, :, -(self.reach + croppable) :]
        return evolved

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = {window: change(rows) for window, rows in self.rows.items()}

    def reset(self) -> None:
        """As in transformers."""
        super().reset()
        self.rows, self.steps = {}, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As in transformers; the tokens so far can no longer be taken back."""
        super().reorder_cache(beam_idx)
        # Beam search takes no tokens back, and would copy the rows for that at every step.
        self.steps = {}
        self.each(lambda rows: rows[:, :, -self.reach :].index_select(0, beam_idx.to(rows.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers.

        Raises:
            ValueError: not enough rows are left.
        """
        for window, rows in self.rows.items():
            left = rows.size(2) + tokens_to_remove - self.reach
            if left < 0:
                raise ValueError(
                    "a cache of evolving attention can be cropped by at most "
                    f"{rows.size(2) - self.reach} tokens now, since it keeps the rows of each map "
                    f"for {CROPPABLE} steps only, and not for those before a reordering, got "
                    f"{-tokens_to_remove}. In assisted decoding, lower the assistant's "
                    "num_assistant_tokens"
                )
            self.steps[window] = [min(left, CROPPABLE)]
        super().crop(tokens_to_remove)
        self.each(lambda rows: rows[:, :, : rows.size(2) + tokens_to_remove])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As in transformers."""
        super().batch_repeat_interleave(repeats)
        self.each(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As in transformers."""
        super().batch_select_indices(indices)
        self.each(lambda rows: rows[indices])


def weights_of(module: nn.Module) -> ContextManager[None]:
    """Brings the weights of a module that accelerate has offloaded, as calling it would."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


class DynamicLayerWithRows(LayerWithRows, DynamicLayer):
    pass


class StaticLayerWithRows(LayerWithRows, StaticLayer):
    pass


KINDS: Dict[Any, Any] = {DynamicLayer: DynamicLayerWithRows, StaticLayer: StaticLayerWithRows}


def layer_with_rows(cache: Cache, layer_idx: int, window: str, query_length: int) -> LayerWithRows:
    """The layer of a cache that holds the rows of one attention; replaces the plain one at first.

    Args:
        cache: transformers' cache of keys and values.
        layer_idx: of the attention.
        window: "causal" or "cross".
        query_length: new tokens of this step.

    Raises:
        ValueError: the cache holds tokens already, but not the rows of their maps; or it is
            neither dynamic nor static, or static in a graph.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= layer_idx:  # they are made as needed
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, LayerWithRows):
        if type(layer) not in KINDS:
            raise ValueError(f"cache must be dynamic or static, got layers of {type(layer)}")
        layer = object.__new__(KINDS[type(layer)])
        layer.__dict__.update(cache.layers[layer_idx].__dict__, rows={}, steps={})
        cache.layers[layer_idx] = layer
    if window not in layer.rows:
        past = layer.get_seq_length()
        if window == "cross":  # self-attention has added its tokens before
            past = past - query_length
        if isinstance(past, Tensor) and torch.compiler.is_compiling():
            raise ValueError(
                "cache must be dynamic to be compiled or exported, since the rows of the attention "
                "maps grow with each step"
            )
        if past > 0:
            raise ValueError(
                f"cache holds {int(past)} tokens, but not the rows of their attention maps: it "
                "must be empty at first, or have been filled by this model. Prefix tuning cannot "
                "be used"
            )
    return layer
