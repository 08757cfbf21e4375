"""The parts of BERT and RoBERTa through which a map passes.

In transformers, the modules of the two have different classes with the same code; each class here
comes before either's in the list of bases.
"""

from typing import Any, ClassVar, Optional, Tuple, Type

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import apply_chunking_to_forward

from ea_transformers.attention import add_evolution
from ea_transformers.model import EvolvingPreTrainedModel

Output = BaseModelOutputWithPastAndCrossAttentions


class EvolvingSelfAttention(nn.Module):
    """Self-attention that takes the previous layer's map and returns its own."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        add_evolution(
            self, config, self.num_attention_heads, evolves=layer_idx > 0, window="bidirectional"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tuple[Tensor, Tensor, Tensor]:
        """Output, probabilities and map; arguments as in transformers, except for:

        Args:
            prev_attn_logits: the map of the previous layer, (batch, heads, tokens, tokens); the
                first layer does not read it.
        """
        output, (attn_probs, attn_logits) = super().forward(*args, **kwargs)
        return output, attn_probs, attn_logits


class EvolvingAttention(nn.Module):
    """Self-attention, projection and residual connection."""

    self_class: ClassVar[Type[EvolvingSelfAttention]]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.self = self.self_class(config, layer_idx)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tuple[Tensor, Tensor]:
        """Output and map; arguments as in :class:`EvolvingSelfAttention`."""
        output, _, attn_logits = self.self(hidden_states, **kwargs)
        return self.output(output, hidden_states), attn_logits


class EvolvingLayer(nn.Module):
    """A layer that takes the previous layer's map and returns its own."""

    attention_class: ClassVar[Type[EvolvingAttention]]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.attention = self.attention_class(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        prev_attn_logits: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, Tensor]:
        """Output and map; arguments as in :class:`EvolvingSelfAttention`."""
        output, attn_logits = self.attention(
            hidden_states,
            attention_mask=attention_mask,
            prev_attn_logits=prev_attn_logits,
            **kwargs,
        )
        output = apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, output
        )
        return output, attn_logits


class EvolvingEncoder(nn.Module):
    """Layers that hand their maps on."""

    layer_class: ClassVar[Type[EvolvingLayer]]

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.layer = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        encoder_hidden_states: Optional[Tensor] = None,
        encoder_attention_mask: Optional[Tensor] = None,
        cache: Any = None,
        use_cache: Optional[bool] = None,
        **kwargs: Any,
    ) -> Output:
        """As in transformers, for an encoder.

        Raises:
            ValueError: there is a cache or the output of another encoder.
        """
        for name, given in (("cache", cache), ("encoder_hidden_states", encoder_hidden_states)):
            if given is not None:
                raise ValueError(
                    f"{name} must be None: this model is an encoder, in which each map has one row "
                    "and one column per token. Prefix tuning cannot be used"
                )
        attn_logits: Optional[Tensor] = None
        for layer in self.layer:
            # Positional, so that the reentrant kind of checkpointing sees them.
            hidden_states, attn_logits = layer(hidden_states, attention_mask, attn_logits, **kwargs)
        return Output(last_hidden_state=hidden_states)


class EvolvingBase(EvolvingPreTrainedModel):
    """A base model whose encoder evolves its maps."""

    encoder_class: ClassVar[Type[EvolvingEncoder]]

    def build_evolving(self) -> None:
        self.embeddings = type(self.embeddings)(self.config)  # for the values of its buffers
        self.encoder = self.encoder_class(self.config)


class EvolvingHead(EvolvingPreTrainedModel):
    """A model with a head on a base model."""

    base_class: ClassVar[Type[EvolvingBase]]

    def build_evolving(self) -> None:
        plain = getattr(self, self.base_model_prefix)
        base = self.base_class(self.config, add_pooling_layer=plain.pooler is not None)
        setattr(self, self.base_model_prefix, base)
