"""BERT with evolving attention."""

from transformers.models.bert import modeling_bert as bert

from ea_transformers.configuration import EABertConfig
from ea_transformers.encoder import (
    EvolvingAttention,
    EvolvingBase,
    EvolvingEncoder,
    EvolvingHead,
    EvolvingLayer,
    EvolvingSelfAttention,
)


class EvolvingBertSelfAttention(EvolvingSelfAttention, bert.BertSelfAttention):
    pass


class EvolvingBertAttention(EvolvingAttention, bert.BertAttention):
    self_class = EvolvingBertSelfAttention


class EvolvingBertLayer(EvolvingLayer, bert.BertLayer):
    attention_class = EvolvingBertAttention


class EvolvingBertEncoder(EvolvingEncoder, bert.BertEncoder):
    layer_class = EvolvingBertLayer


class EABertModel(EvolvingBase, bert.BertModel):
    """transformers' BertModel whose attention maps evolve from layer to layer."""

    config: EABertConfig
    encoder_class = EvolvingBertEncoder
    _no_split_modules = ("BertEmbeddings", "EvolvingBertLayer")


class EABertHead(EvolvingHead):
    config: EABertConfig
    base_class = EABertModel


class EABertForPreTraining(EABertHead, bert.BertForPreTraining):
    """transformers' BertForPreTraining on an :class:`EABertModel`."""


class EABertForMaskedLM(EABertHead, bert.BertForMaskedLM):
    """transformers' BertForMaskedLM on an :class:`EABertModel`."""


class EABertForNextSentencePrediction(EABertHead, bert.BertForNextSentencePrediction):
    """transformers' BertForNextSentencePrediction on an :class:`EABertModel`."""


class EABertForSequenceClassification(EABertHead, bert.BertForSequenceClassification):
    """transformers' BertForSequenceClassification on an :class:`EABertModel`."""


class EABertForMultipleChoice(EABertHead, bert.BertForMultipleChoice):
    """transformers' BertForMultipleChoice on an :class:`EABertModel`."""


class EABertForTokenClassification(EABertHead, bert.BertForTokenClassification):
    """transformers' BertForTokenClassification on an :class:`EABertModel`."""


class EABertForQuestionAnswering(EABertHead, bert.BertForQuestionAnswering):
    """transformers' BertForQuestionAnswering on an :class:`EABertModel`."""
