"""RoBERTa with evolving attention."""

from transformers.models.roberta import modeling_roberta as roberta

from ea_transformers.configuration import EARobertaConfig
from ea_transformers.encoder import (
    EvolvingAttention,
    EvolvingBase,
    EvolvingEncoder,
    EvolvingHead,
    EvolvingLayer,
    EvolvingSelfAttention,
)


class EvolvingRobertaSelfAttention(EvolvingSelfAttention, roberta.RobertaSelfAttention):
    pass


class EvolvingRobertaAttention(EvolvingAttention, roberta.RobertaAttention):
    self_class = EvolvingRobertaSelfAttention


class EvolvingRobertaLayer(EvolvingLayer, roberta.RobertaLayer):
    attention_class = EvolvingRobertaAttention


class EvolvingRobertaEncoder(EvolvingEncoder, roberta.RobertaEncoder):
    layer_class = EvolvingRobertaLayer


class EARobertaModel(EvolvingBase, roberta.RobertaModel):
    """transformers' RobertaModel whose attention maps evolve from layer to layer."""

    config: EARobertaConfig
    encoder_class = EvolvingRobertaEncoder
    _no_split_modules = ("RobertaEmbeddings", "EvolvingRobertaLayer")


class EARobertaHead(EvolvingHead):
    config: EARobertaConfig
    base_class = EARobertaModel


class EARobertaForMaskedLM(EARobertaHead, roberta.RobertaForMaskedLM):
    """transformers' RobertaForMaskedLM on an :class:`EARobertaModel`."""


class EARobertaForSequenceClassification(EARobertaHead, roberta.RobertaForSequenceClassification):
    """transformers' RobertaForSequenceClassification on an :class:`EARobertaModel`."""


class EARobertaForMultipleChoice(EARobertaHead, roberta.RobertaForMultipleChoice):
    """transformers' RobertaForMultipleChoice on an :class:`EARobertaModel`."""


class EARobertaForTokenClassification(EARobertaHead, roberta.RobertaForTokenClassification):
    """transformers' RobertaForTokenClassification on an :class:`EARobertaModel`."""


class EARobertaForQuestionAnswering(EARobertaHead, roberta.RobertaForQuestionAnswering):
    """transformers' RobertaForQuestionAnswering on an :class:`EARobertaModel`."""
