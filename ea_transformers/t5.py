"""T5 with evolving attention in its encoder, its decoder and between them.

transformers hands T5's position bias from layer to layer, through blocks that do not look at it.
Here each attention hands on both the bias and its map.
"""

from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers.models.t5 import modeling_t5 as t5
from transformers.utils.deprecation import deprecate_kwarg

from ea_transformers.attention import add_evolution, hidden_cells
from ea_transformers.cache import layer_with_rows
from ea_transformers.configuration import EAT5Config
from ea_transformers.model import EvolvingPreTrainedModel


class BiasAndMap(NamedTuple):
    """What passes from an attention to that of the next layer.

    Attributes:
        position_bias: transformers' own, (1 or batch, heads, queries, keys).
        attn_logits: the map, (batch, heads, queries, keys); None if it does not evolve.
    """

    position_bias: Tensor
    attn_logits: Optional[Tensor]


# As transformers' own methods do; to be removed with its deprecation.
old_name_of_cache = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


class EvolvingT5Attention(t5.T5Attention):
    """transformers' T5Attention, which takes the previous layer's map and returns its own.

    Args:
        kind: "encoder" or "decoder" for their self-attention, "cross" for encoder-decoder
            attention. Its maps evolve if the configuration's `ea_attentions` names it.
    """

    def __init__(self, *args: Any, kind: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        window = {"encoder": "bidirectional", "decoder": "causal"}.get(kind, kind)
        self.hands_on = bool(config.evolution) and kind in config.ea_attentions
        add_evolution(self, config, self.n_heads, self.hands_on and self.layer_idx > 0, window)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_bias: Optional[BiasAndMap] = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, BiasAndMap, Tensor]:
        """Output, what to hand on, and probabilities; arguments as in transformers, except for:

        Args:
            position_bias: what the previous layer handed on; None in the first one.
        """
        prev = BiasAndMap(None, None) if position_bias is None else position_bias
        rows = None
        if self.evolution is not None and self.config.needs_rows and cache is not None:
            rows = layer_with_rows(cache, self.layer_idx, self.window, hidden_states.size(1))
        output, bias, (attn_probs, attn_logits) = super().forward(
            hidden_states,
            position_bias=prev.position_bias,
            cache=cache,
            prev_attn_logits=prev.attn_logits,
            rows=rows,
            **kwargs,
        )
        return output, BiasAndMap(bias, attn_logits if self.hands_on else None), attn_probs


class EvolvingT5PreTrainedModel(EvolvingPreTrainedModel, t5.T5PreTrainedModel):
    config: EAT5Config

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, flat(gradient_checkpointing_func), **kwargs)

    def build_evolving(self) -> None:
        for name in ("encoder", "decoder"):
            if hasattr(self, name):
                setattr(self, name, EAT5Stack(getattr(self, name).config))


def flat(checkpoint_function: Callable) -> Callable:
    """The checkpointing function for layers with tuples among their arguments and results.

    The reentrant kind would neither see the tensors in them nor give them gradients.
    """

    def run(function: Callable, *args: Any) -> Any:
        leaves, structure = tree_flatten(args)
        result_structure = None

        def flat_function(*leaves: Any) -> Tuple[Any, ...]:
            nonlocal result_structure
            result = function(*tree_unflatten(leaves, structure))
            leaves, result_structure = tree_flatten(result)
            return tuple(leaves)

        return tree_unflatten(checkpoint_function(flat_function, *leaves), result_structure)

    return run


class EAT5Stack(EvolvingT5PreTrainedModel, t5.T5Stack):
    """transformers' T5Stack, encoder or decoder, whose attention maps evolve."""

    def build_evolving(self) -> None:
        for block in self.block:
            layer = block.layer[0]
            kind = "decoder" if self.is_decoder else "encoder"
            layer.SelfAttention = self.evolving(layer.SelfAttention, kind)
            if self.is_decoder:
                layer = block.layer[1]
                layer.EncDecAttention = self.evolving(layer.EncDecAttention, "cross")

    def evolving(self, plain: t5.T5Attention, kind: str) -> EvolvingT5Attention:
        return EvolvingT5Attention(
            self.config,
            has_relative_attention_bias=plain.has_relative_attention_bias,
            layer_idx=plain.layer_idx,
            is_causal=plain.is_causal,
            kind=kind,
        )

    @old_name_of_cache
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        encoder_hidden_states: Optional[Tensor] = None,
        encoder_attention_mask: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if self.is_decoder and attention_mask is not None and tokens is not None:
            past = 0 if cache is None else cache.get_seq_length()
            kwargs["padded_queries"] = padded_queries(attention_mask, tokens.size(1), past)
        return super().forward(
            input_ids,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            inputs_embeds,
            cache,
            **kwargs,
        )


def padded_queries(attention_mask: Tensor, query_length: int, past: Any) -> Tensor:
    """True for queries of a decoder that are padding, (batch, 1 or heads, queries, 1).

    Args:
        attention_mask: (batch, past + queries), 0 for padding; or (batch, 1 or heads, 1 or queries,
            keys), in which a token that does not see itself is padding.
        query_length: new tokens of this step.
        past: tokens of earlier steps; a tensor of one integer in a static cache.

    Raises:
        ValueError: a mask of two dimensions does not cover all tokens.
    """
    positions = torch.arange(query_length, device=attention_mask.device) + past
    if attention_mask.dim() == 4:
        hidden = hidden_cells(attention_mask).expand(-1, -1, query_length, -1)
        return hidden.gather(3, positions.view(1, 1, -1, 1).expand(*hidden.shape[:3], 1))
    if isinstance(past, int) and attention_mask.size(1) < past + query_length:
        raise ValueError(
            f"decoder_attention_mask must cover the {past} tokens in the cache and the "
            f"{query_length} new ones, got shape {tuple(attention_mask.shape)}"
        )
    return attention_mask.index_select(1, positions).eq(0)[:, None, :, None]


class EAT5Model(EvolvingT5PreTrainedModel, t5.T5Model):
    """transformers' T5Model whose attention maps evolve from layer to layer."""


class EAT5EncoderModel(EvolvingT5PreTrainedModel, t5.T5EncoderModel):
    """transformers' T5EncoderModel whose attention maps evolve from layer to layer."""


class EAT5ForConditionalGeneration(EvolvingT5PreTrainedModel, t5.T5ForConditionalGeneration):
    """transformers' T5ForConditionalGeneration with evolving attention."""

    def _valid_auto_compile_criteria(self, *args: Any) -> bool:
        # A static cache does not say before the first step that its layers will keep rows, which
        # grow with every step.
        return not self.config.needs_rows and super()._valid_auto_compile_criteria(*args)


class EAT5ForQuestionAnswering(EvolvingT5PreTrainedModel, t5.T5ForQuestionAnswering):
    """transformers' T5ForQuestionAnswering with evolving attention."""


class EAT5ForSequenceClassification(EvolvingT5PreTrainedModel, t5.T5ForSequenceClassification):
    """transformers' T5ForSequenceClassification on an :class:`EAT5Model`."""

    def build_evolving(self) -> None:
        self.transformer = EAT5Model(self.config)


class EAT5ForTokenClassification(EvolvingT5PreTrainedModel, t5.T5ForTokenClassification):
    """transformers' T5ForTokenClassification on an :class:`EAT5EncoderModel`."""

    def build_evolving(self) -> None:
        self.transformer = EAT5EncoderModel(self.config)
