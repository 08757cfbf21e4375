"""fairseq's multi-head attention, which takes the previous layer's map and returns its own."""

import logging
from types import FunctionType
from typing import Callable, Dict, Optional, Tuple

import torch
from fairseq import utils
from fairseq.modules import FairseqDropout, MultiheadAttention
from torch import Tensor, nn

from evolving_attention import AttentionEvolution, AttentionProbe

logger = logging.getLogger(__name__)


def renamed(method: Callable, name: str) -> Callable:
    """The method under another name: TorchScript does not support super()."""
    copy = FunctionType(
        method.__code__, method.__globals__, name, method.__defaults__, method.__closure__
    )
    copy.__annotations__ = method.__annotations__
    return copy


class EvolvingMultiheadAttention(MultiheadAttention):
    """Multi-head attention whose map evolves from the map of the previous layer.

    It differs from fairseq's class in that :meth:`forward` takes the previous map and also returns
    its own, that incremental decoding caches the rows that the convolution reads, and that there is
    no `before_softmax`.

    Args:
        evolution: how the map evolves; None in the first layer, which has no previous map.
        args, kwargs: as in fairseq.
    """

    drops_evolution = True  # when it is loaded as the first layer of a stack
    reorder_plain_state = renamed(
        MultiheadAttention.reorder_incremental_state, "reorder_plain_state"
    )

    def __init__(self, *args, evolution: Optional[AttentionEvolution] = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        keep_dropout_name(self, "MultiheadAttention")
        self.evolution = evolution
        self.probe = AttentionProbe()

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        need_head_weights: bool = False,
        query_padding_mask: Optional[Tensor] = None,
        prev_attn_logits: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """As in fairseq, except for:

        Args:
            attn_mask: bool, (tgt_len, src_len), True where a query must not see a key.
            query_padding_mask: bool, (batch, tgt_len), True at padding; in self-attention it
                follows from `key_padding_mask`.
            prev_attn_logits: the map of the previous layer, (batch, heads, tgt_len, src_len);
                None for plain attention.

        Returns:
            The output, (tgt_len, batch, embed_dim); the probabilities if asked for, (batch,
            tgt_len, src_len), or (heads, batch, tgt_len, src_len) with `need_head_weights`; and
            the map to hand on.

        Raises:
            ValueError: `attn_mask` is not bool, or `prev_attn_logits` does not fit.
        """
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            raise ValueError(f"attn_mask must be of dtype torch.bool, got {attn_mask.dtype}")
        tgt_len, bsz, _ = query.size()
        q = self.split_heads(self.q_proj(query) * self.scaling)
        k, v, key_padding_mask = self.keys_and_values(
            key, value, key_padding_mask, incremental_state, static_kv, bsz
        )
        if k.size(0) == bsz:
            attn_logits = torch.matmul(q, k.transpose(2, 3))
        else:  # in beam search there is one copy of a sentence's keys for all its beams
            q = q.view(k.size(0), -1, self.num_heads, tgt_len, self.head_dim)
            attn_logits = torch.einsum("bxhtd,bhsd->bxhts", q, k).flatten(0, 1)
            if key_padding_mask is not None:
                beams = bsz // k.size(0)
                key_padding_mask = key_padding_mask.repeat_interleave(beams, dim=0)

        if self.self_attention and key_padding_mask is not None:
            query_padding_mask = key_padding_mask[:, k.size(2) - tgt_len :]
        hidden = join_masks(attn_mask, key_padding_mask)
        mask = hidden
        if query_padding_mask is not None:
            padded = query_padding_mask.unsqueeze(1).unsqueeze(3)
            mask = padded if hidden is None else hidden | padded
        attn_logits = self.evolve(attn_logits, prev_attn_logits, mask, incremental_state)

        scores = attn_logits
        if hidden is not None:
            # The lowest number of fp16 becomes 0 in the softmax, like -inf, but a padded query that
            # sees no key does not become NaN.
            scores = attn_logits.masked_fill(hidden, -65504.0)
        attn_probs = utils.softmax(scores, dim=-1, onnx_trace=self.onnx_trace)
        attn_probs = self.probe(attn_probs, attn_logits)
        dropped = self.dropout_module(attn_probs.type_as(attn_logits))
        if v.size(0) == bsz:
            x = torch.matmul(dropped, v)
        else:
            dropped = dropped.view(v.size(0), -1, self.num_heads, tgt_len, v.size(2))
            x = torch.einsum("bxhts,bhsd->bxhtd", dropped, v).flatten(0, 1)
        x = self.out_proj(x.permute(2, 0, 1, 3).reshape(tgt_len, bsz, self.embed_dim))

        probs: Optional[Tensor] = None
        if need_head_weights:
            probs = attn_probs.transpose(0, 1)
        elif need_weights:
            probs = attn_probs.mean(dim=1)
        return x, probs, attn_logits

    def split_heads(self, x: Tensor) -> Tensor:
        """(len, batch, embed_dim) -> (batch, heads, len, head_dim)."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def keys_and_values(
        self,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]],
        static_kv: bool,
        bsz: int,
    ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Keys and values, (batch, heads, src_len, head_dim), and the mask of their padding.

        With an incremental state they include those of earlier calls, or are those if `static_kv`.
        """
        saved = self._get_input_buffer(incremental_state)
        prev_key: Optional[Tensor] = None
        prev_value: Optional[Tensor] = None
        prev_mask: Optional[Tensor] = None
        if "prev_key" in saved:
            prev_key, prev_value = saved["prev_key"], saved["prev_value"]
            prev_mask = saved["prev_key_padding_mask"]
        if static_kv and prev_key is not None and prev_value is not None:
            k, v, key_padding_mask = prev_key, prev_value, prev_mask
        else:
            assert key is not None and value is not None
            expanded = key.size(1) == bsz  # the encoder's output is repeated for each beam
            if static_kv and incremental_state is not None and self.beam_size > 1 and expanded:
                key, value = key[:, :: self.beam_size], value[:, :: self.beam_size]
                if key_padding_mask is not None:
                    key_padding_mask = key_padding_mask[:: self.beam_size]
            k, v = self.split_heads(self.k_proj(key)), self.split_heads(self.v_proj(value))
            if prev_key is not None and prev_value is not None:
                k = torch.cat([prev_key, k], dim=2)
                v = torch.cat([prev_value, v], dim=2)
                key_padding_mask = self._append_prev_key_padding_mask(
                    key_padding_mask, prev_mask, k.size(0), k.size(2), static_kv
                )
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.to(torch.bool)
        if incremental_state is not None:
            saved = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask}
            self._set_input_buffer(incremental_state, saved)
        return k, v, key_padding_mask

    def evolve(
        self,
        attn_logits: Tensor,
        prev_attn_logits: Optional[Tensor],
        mask: Optional[Tensor],
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]],
    ) -> Tensor:
        """The evolved map, (batch, heads, tgt_len, src_len); plain logits if there is no map."""
        if self.evolution is None or prev_attn_logits is None:
            return attn_logits
        # fairseq's activation checkpointing recomputes outside of autocast.
        prev_attn_logits = prev_attn_logits.type_as(attn_logits)
        if incremental_state is None:
            return self.evolution(attn_logits, prev_attn_logits, mask)
        rows: Optional[Tensor] = None
        saved = self.get_incremental_state(incremental_state, "evolution")
        if saved is not None:
            rows = saved["rows"]
        attn_logits, rows = self.evolution.step(attn_logits, prev_attn_logits, mask, rows)
        self.set_incremental_state(incremental_state, "evolution", {"rows": rows})
        return attn_logits

    @torch.jit.export
    def reorder_incremental_state(
        self,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]],
        new_order: Tensor,
    ) -> Optional[Dict[str, Dict[str, Optional[Tensor]]]]:
        """Also reorders the cached rows, of which each beam has its own in every attention."""
        saved = self.get_incremental_state(incremental_state, "evolution")
        if saved is not None:
            rows = saved["rows"]
            if rows is not None:
                saved["rows"] = rows.index_select(0, new_order)
        return self.reorder_plain_state(incremental_state, new_order)

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        """Drops the evolution of a layer that became the first of its stack by pruning."""
        if self.drops_evolution and self.evolution is None:
            for name in [key for key in state_dict if key.startswith(f"{prefix}evolution.")]:
                logger.warning("%s is not used: the first layer has no previous map", name)
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _adaptive_prune_heads(self, reserve_head_index) -> None:
        raise NotImplementedError(
            "heads of an evolving attention cannot be pruned (mha_heads_to_keep): they are the "
            "channels of its convolution"
        )


class PlainMultiheadAttention(EvolvingMultiheadAttention):
    """fairseq's attention for a layer whose map does not evolve: it hands no map on."""

    drops_evolution = False
    forward_with_map = renamed(EvolvingMultiheadAttention.forward, "forward_with_map")

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        need_head_weights: bool = False,
        query_padding_mask: Optional[Tensor] = None,
        prev_attn_logits: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """As in :class:`EvolvingMultiheadAttention`, with None for the map."""
        if torch.jit.is_scripting() or self.probe.watched():
            # fairseq's own forward does not expose its map, and TorchScript cannot call it here.
            x, attn_probs, _ = self.forward_with_map(
                query,
                key,
                value,
                key_padding_mask,
                incremental_state,
                need_weights,
                static_kv,
                attn_mask,
                need_head_weights,
            )
        else:
            if attn_mask is not None:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                    attn_mask, float("-inf")
                )
            x, attn_probs = MultiheadAttention.forward(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                incremental_state=incremental_state,
                need_weights=need_weights,
                static_kv=static_kv,
                attn_mask=attn_mask,
                need_head_weights=need_head_weights,
            )
        return x, attn_probs, None


def join_masks(attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor]) -> Optional[Tensor]:
    """Cells that the softmax must not see, broadcastable to (batch, heads, tgt_len, src_len)."""
    if key_padding_mask is None:
        return attn_mask
    padded = key_padding_mask.unsqueeze(1).unsqueeze(2)
    return padded if attn_mask is None else padded | attn_mask


def keep_dropout_name(module: nn.Module, host: str) -> None:
    """Names the dropouts of `module` as in fairseq's class, for ``--retain-dropout-modules``."""
    for child in module.children():
        if isinstance(child, FairseqDropout):
            child.module_name = host
