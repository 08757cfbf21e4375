"""Evolving attention for Hugging Face transformers.

``import ea_transformers`` registers the models with the Auto classes. They are used like
transformers' own, and load the weights of plain checkpoints, too::

    from ea_transformers import EABertForSequenceClassification

    model = EABertForSequenceClassification.from_pretrained(
        "bert-base-uncased", ea_alpha=0, ea_beta=0, ea_learnable=True
    )
"""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.24"):
    raise ImportError(
        f"ea_transformers needs transformers >= 5.24, found {transformers.__version__}: "
        "pip install -U 'transformers>=5.24' (with Python 3.11 or newer)"
    )

from transformers import AutoConfig, AutoTokenizer

from ea_transformers import bert, roberta, t5
from ea_transformers.bert import (
    EABertForMaskedLM,
    EABertForMultipleChoice,
    EABertForNextSentencePrediction,
    EABertForPreTraining,
    EABertForQuestionAnswering,
    EABertForSequenceClassification,
    EABertForTokenClassification,
    EABertModel,
)
from ea_transformers.configuration import EABertConfig, EARobertaConfig, EAT5Config
from ea_transformers.roberta import (
    EARobertaForMaskedLM,
    EARobertaForMultipleChoice,
    EARobertaForQuestionAnswering,
    EARobertaForSequenceClassification,
    EARobertaForTokenClassification,
    EARobertaModel,
)
from ea_transformers.t5 import (
    EAT5EncoderModel,
    EAT5ForConditionalGeneration,
    EAT5ForQuestionAnswering,
    EAT5ForSequenceClassification,
    EAT5ForTokenClassification,
    EAT5Model,
)

__all__ = [
    "EABertConfig",
    "EABertForMaskedLM",
    "EABertForMultipleChoice",
    "EABertForNextSentencePrediction",
    "EABertForPreTraining",
    "EABertForQuestionAnswering",
    "EABertForSequenceClassification",
    "EABertForTokenClassification",
    "EABertModel",
    "EARobertaConfig",
    "EARobertaForMaskedLM",
    "EARobertaForMultipleChoice",
    "EARobertaForQuestionAnswering",
    "EARobertaForSequenceClassification",
    "EARobertaForTokenClassification",
    "EARobertaModel",
    "EAT5Config",
    "EAT5EncoderModel",
    "EAT5ForConditionalGeneration",
    "EAT5ForQuestionAnswering",
    "EAT5ForSequenceClassification",
    "EAT5ForTokenClassification",
    "EAT5Model",
    "bert",
    "roberta",
    "t5",
]

# The plain model's tokenizer, our configuration, and our class for each Auto class.
MODELS = (
    (
        "BertTokenizer",
        EABertConfig,
        {
            "AutoModel": EABertModel,
            "AutoModelForPreTraining": EABertForPreTraining,
            "AutoModelForMaskedLM": EABertForMaskedLM,
            "AutoModelForNextSentencePrediction": EABertForNextSentencePrediction,
            "AutoModelForSequenceClassification": EABertForSequenceClassification,
            "AutoModelForMultipleChoice": EABertForMultipleChoice,
            "AutoModelForTokenClassification": EABertForTokenClassification,
            "AutoModelForQuestionAnswering": EABertForQuestionAnswering,
            "AutoModelForTextEncoding": EABertModel,
        },
    ),
    (
        "RobertaTokenizer",
        EARobertaConfig,
        {
            "AutoModel": EARobertaModel,
            "AutoModelForPreTraining": EARobertaForMaskedLM,
            "AutoModelForMaskedLM": EARobertaForMaskedLM,
            "AutoModelForSequenceClassification": EARobertaForSequenceClassification,
            "AutoModelForMultipleChoice": EARobertaForMultipleChoice,
            "AutoModelForTokenClassification": EARobertaForTokenClassification,
            "AutoModelForQuestionAnswering": EARobertaForQuestionAnswering,
            "AutoModelForTextEncoding": EARobertaModel,
        },
    ),
    (
        "T5Tokenizer",
        EAT5Config,
        {
            "AutoModel": EAT5Model,
            "AutoModelForPreTraining": EAT5ForConditionalGeneration,
            "AutoModelForSeq2SeqLM": EAT5ForConditionalGeneration,
            "AutoModelForSequenceClassification": EAT5ForSequenceClassification,
            "AutoModelForTokenClassification": EAT5ForTokenClassification,
            "AutoModelForQuestionAnswering": EAT5ForQuestionAnswering,
            "AutoModelForTextEncoding": EAT5EncoderModel,
        },
    ),
)

for tokenizer, config_class, models in MODELS:
    AutoConfig.register(config_class.model_type, config_class)
    AutoTokenizer.register(config_class, getattr(transformers, tokenizer))
    for auto, model_class in models.items():
        getattr(transformers, auto).register(config_class, model_class)
