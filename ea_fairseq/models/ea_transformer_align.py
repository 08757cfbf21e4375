"""``ea_transformer_align``: a transformer with one head supervised by word alignments."""

from argparse import ArgumentParser, Namespace

from fairseq.models import register_model
from fairseq.models.transformer_align import TransformerAlignModel, transformer_align
from fairseq.tasks import FairseqTask

from ea_fairseq.models.ea_transformer import (
    EATransformerConfig,
    EATransformerModel,
    TransformerEvolutionConfig,
)
from ea_fairseq.models.options import add_options, register_architectures_of
from evolving_attention.loading import StartsFromPlainWeights


@register_model("ea_transformer_align")
class EATransformerAlignModel(TransformerAlignModel, StartsFromPlainWeights):
    """fairseq's :class:`TransformerAlignModel` whose attention maps evolve from layer to layer."""

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Adds the options; the architectures give the defaults."""
        TransformerAlignModel.add_args(parser)
        add_options(parser, TransformerEvolutionConfig)

    @classmethod
    def build_model(cls, args: Namespace, task: FairseqTask) -> "EATransformerAlignModel":
        """Builds the model. Raises ValueError, naming the option, if that is impossible."""
        transformer_align(args)  # completes the options of callers and old checkpoints
        model = EATransformerModel.build_model(args, task)
        return cls(model.encoder, model.decoder, args)


register_architectures_of("transformer_align", EATransformerConfig)
