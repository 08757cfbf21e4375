"""``ea_roberta``, ``ea_bert``: fairseq's RoBERTa with evolving attention, for GLUE."""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from typing import Dict

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model
from fairseq.models.roberta import RobertaEncoder, RobertaModel
from fairseq.models.roberta.model import base_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.tasks import FairseqTask
from fairseq.utils import safe_hasattr
from omegaconf import OmegaConf, open_dict

from ea_fairseq.models.ea_transformer import EATransformerConfig
from ea_fairseq.models.options import (
    EvolutionConfig,
    add_options,
    check_evolution,
    check_heads,
    check_names,
    register_architecture,
    register_architectures_of,
)
from ea_fairseq.modules import EvolvingTransformerEncoder
from evolving_attention.loading import StartsFromPlainWeights


class EvolvingRobertaEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder whose self-attention maps evolve from layer to layer."""

    def build_encoder(self, args, dictionary, embed_tokens) -> EvolvingTransformerEncoder:
        cfg = EATransformerConfig.from_namespace(args)
        check_evolution(cfg)
        cfg.checkpoint_activations |= cfg.offload_activations
        encoder = EvolvingTransformerEncoder(cfg, dictionary, embed_tokens)
        encoder.apply(init_bert_params)
        return encoder


@register_model("ea_roberta")
class EARobertaModel(RobertaModel, StartsFromPlainWeights):
    """fairseq's RoBERTa whose attention maps evolve from layer to layer.

    It has all options and methods of :class:`fairseq.models.roberta.RobertaModel`, including its
    hub interface and its classification heads, the ``--ea-*`` options of
    :class:`~ea_fairseq.models.options.EvolutionConfig`, and ``--checkpoint-activations``. With
    alpha = beta = 0 it is that model.
    """

    @classmethod
    def hub_models(cls) -> Dict:
        return {}

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Adds the options; the architectures give the defaults."""
        RobertaModel.add_args(parser)
        parser.add_argument(
            "--checkpoint-activations",
            action="store_true",
            help="recompute activations in the backward pass, to save memory",
        )
        parser.add_argument(
            "--offload-activations",
            action="store_true",
            help="move checkpointed activations to the CPU (sets --checkpoint-activations)",
        )
        add_options(parser, EvolutionConfig)

    @classmethod
    def build_model(cls, args: Namespace, task: FairseqTask) -> "EARobertaModel":
        """Builds the model. Raises ValueError, naming the option, if that is impossible."""
        check_names(args, EvolutionConfig)
        with open_dict(args) if OmegaConf.is_config(args) else nullcontext():
            base_architecture(args)  # completes the options of callers and old checkpoints
            if not safe_hasattr(args, "max_positions"):
                if not safe_hasattr(args, "tokens_per_sample"):
                    args.tokens_per_sample = task.max_positions()
                args.max_positions = args.tokens_per_sample
            check_heads("encoder", args.encoder_attention_heads, args.encoder_embed_dim)
            if getattr(args, "mha_heads_to_keep", -1) != -1:
                raise ValueError(
                    "--mha-heads-to-keep cannot be used: heads are the channels of the convolution"
                )
            encoder = EvolvingRobertaEncoder(args, task.source_dictionary)
        return cls(args, encoder)


register_architectures_of("roberta", EvolutionConfig)
for size in ("base", "large"):  # BERT's sizes are RoBERTa's
    sizes = ARCH_CONFIG_REGISTRY[f"roberta_{size}"]
    register_architecture("ea_roberta", f"ea_bert_{size}", sizes, EvolutionConfig)
