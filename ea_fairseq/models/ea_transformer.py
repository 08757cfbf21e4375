"""``ea_transformer``: fairseq's transformer with evolving attention, for translation."""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Dict

from fairseq.data import Dictionary
from fairseq.models import register_model
from fairseq.models.transformer import TransformerConfig, TransformerModel, base_architecture
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf, open_dict
from torch import nn

from ea_fairseq.models.options import (
    ATTENTIONS,
    KEYS,
    EvolutionConfig,
    add_options,
    check_evolution,
    check_heads,
    check_names,
    register_architecture,
    register_architectures_of,
)
from ea_fairseq.modules import EvolvingTransformerDecoder, EvolvingTransformerEncoder
from evolving_attention.loading import StartsFromPlainWeights

# Options that fairseq completes when it builds a model, and then saves in checkpoints.
COMPLETED = (
    "encoder_layers",  # how many --encoder-layers-to-keep leaves
    "decoder_layers",
    "max_source_positions",
    "max_target_positions",
    "min_params_to_wrap",
    "share_decoder_input_output_embed",
)


@dataclass
class TransformerEvolutionConfig(EvolutionConfig):
    ea_attentions: str = field(
        default=",".join(ATTENTIONS),
        metadata={
            "help": "which attentions evolve, comma-separated: encoder (self), decoder (self), "
            "cross (encoder-decoder) (default: encoder,decoder,cross)"
        },
    )
    ea_keys: str = field(
        default=KEYS[0],
        metadata={
            "help": "which keys of earlier queries the decoder's convolution reads: earlier (it "
            "ends at the key) or centred (on both sides; the future counts as 0) (default: earlier)"
        },
    )


@dataclass
class EATransformerConfig(TransformerEvolutionConfig, TransformerConfig):
    pass


def check_config(cfg: EATransformerConfig) -> None:
    """Raises ValueError, naming the option, if the model cannot be built or cannot evolve."""
    check_evolution(cfg)
    for side, part in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        check_heads(side, part.attention_heads, part.embed_dim)
        if part.xformers_att_config:
            raise ValueError(
                f"--{side}-xformers-att-config cannot be used: xFormers returns no attention map"
            )
    if cfg.base_layers:
        raise ValueError("--base-layers must be 0: a BASE layer has no attention map to hand on")
    if cfg.cross_self_attention:
        raise ValueError(
            "--cross-self-attention cannot be used: source and target share one attention map, "
            "which would need two windows"
        )


@register_model("ea_transformer")
class EATransformerModel(TransformerModel, StartsFromPlainWeights):
    """fairseq's transformer whose attention maps evolve from layer to layer.

    It has all options and methods of :class:`fairseq.models.transformer.TransformerModel`, and the
    ``--ea-*`` options of :class:`EATransformerConfig`. With alpha = beta = 0 it is that model.
    """

    @classmethod
    def hub_models(cls) -> Dict:
        return {}

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the options; the architectures give the defaults."""
        add_options(parser, EATransformerConfig)

    @classmethod
    def build_model(cls, args: Namespace, task: FairseqTask) -> "EATransformerModel":
        """Builds the model. Raises ValueError, naming the option, if that is impossible."""
        check_names(args, EATransformerConfig)
        base_architecture(args)  # completes the options of callers and old checkpoints
        cfg = EATransformerConfig.from_namespace(args)
        check_config(cfg)
        model = super().build_model(cfg, task)
        with open_dict(args) if OmegaConf.is_config(args) else nullcontext():
            for option in COMPLETED:
                setattr(args, option, getattr(cfg, option))
        return model

    @classmethod
    def build_encoder(
        cls, cfg: EATransformerConfig, src_dict: Dictionary, embed_tokens: nn.Embedding
    ) -> EvolvingTransformerEncoder:
        return EvolvingTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(
        cls, cfg: EATransformerConfig, tgt_dict: Dictionary, embed_tokens: nn.Embedding
    ) -> EvolvingTransformerDecoder:
        return EvolvingTransformerDecoder(
            cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention
        )


def transformer_lite(args: Namespace) -> None:
    """Transformer-Lite (paper, machine translation): 6 + 6 layers of width 160 with 4 heads."""
    for side in ("encoder", "decoder"):
        for option, value in (("embed_dim", 160), ("ffn_embed_dim", 160), ("attention_heads", 4)):
            name = f"{side}_{option}"
            setattr(args, name, getattr(args, name, value))
    base_architecture(args)


register_architecture(
    "ea_transformer", "ea_transformer_lite", transformer_lite, EATransformerConfig
)
register_architectures_of("transformer", EATransformerConfig)
