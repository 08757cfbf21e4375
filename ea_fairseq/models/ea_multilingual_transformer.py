"""``ea_multilingual_transformer``: a transformer for each pair of languages, or shared parts."""

from argparse import ArgumentParser, Namespace
from collections import OrderedDict
from typing import Any

from fairseq.models import register_model
from fairseq.models.multilingual_transformer import MultilingualTransformerModel
from fairseq.tasks import FairseqTask
from torch import nn

from ea_fairseq.models.ea_transformer import (
    EATransformerConfig,
    TransformerEvolutionConfig,
    check_config,
)
from ea_fairseq.models.options import add_options, check_names, register_architectures_of
from ea_fairseq.modules import EvolvingTransformerDecoder, EvolvingTransformerEncoder
from evolving_attention.loading import StartsFromPlainWeights


@register_model("ea_multilingual_transformer")
class EAMultilingualTransformerModel(MultilingualTransformerModel, StartsFromPlainWeights):
    """fairseq's :class:`MultilingualTransformerModel` whose attention maps evolve."""

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Adds the options; the architectures give the defaults."""
        MultilingualTransformerModel.add_args(parser)
        add_options(parser, TransformerEvolutionConfig)

    @classmethod
    def build_model(cls, args: Namespace, task: FairseqTask) -> "EAMultilingualTransformerModel":
        """Builds the model. Raises ValueError, naming the option, if that is impossible."""
        check_names(args, EATransformerConfig)
        for option in ("encoder_layers_to_keep", "decoder_layers_to_keep"):
            if getattr(args, option, None):
                raise ValueError(
                    f"--{option.replace('_', '-')} cannot be used with ea_multilingual_transformer"
                )
        pairs = super().build_model(args, task).models
        return cls(
            OrderedDict((name, pair.encoder) for name, pair in pairs.items()),
            OrderedDict((name, pair.decoder) for name, pair in pairs.items()),
        )

    @classmethod
    def _get_module_class(
        cls, is_encoder: bool, args: Namespace, lang_dict: Any, embed_tokens: nn.Module, langs: Any
    ) -> nn.Module:
        cfg = EATransformerConfig.from_namespace(args)
        check_config(cfg)
        module_class = EvolvingTransformerEncoder if is_encoder else EvolvingTransformerDecoder
        return module_class(cfg, lang_dict, embed_tokens)


register_architectures_of("multilingual_transformer", EATransformerConfig)
