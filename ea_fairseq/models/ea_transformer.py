"""``ea_transformer``: fairseq's transformer with evolving attention, for translation."""

from dataclasses import dataclass, field
from typing import Dict

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import TransformerConfig, TransformerModel, base_architecture
from omegaconf import DictConfig

from ea_fairseq.modules import EvolvingTransformerDecoder, EvolvingTransformerEncoder
from evolving_attention.modules import check_options

ATTENTIONS = ("encoder", "decoder", "cross")


@dataclass
class EATransformerConfig(TransformerConfig):
    ea_alpha: float = field(
        default=0.1,
        metadata={"help": "weight of the previous layer's map, 0 to 1 (default: 0.1)"},
    )
    ea_beta: float = field(
        default=0.1,
        metadata={"help": "weight of the convolution over the map, 0 to 1 (default: 0.1)"},
    )
    ea_kernel_size: int = field(
        default=3, metadata={"help": "size of that convolution, odd (default: 3)"}
    )
    ea_attentions: str = field(
        default=",".join(ATTENTIONS),
        metadata={
            "help": "which attentions evolve, comma-separated: encoder (self), decoder (self), "
            "cross (encoder-decoder) (default: encoder,decoder,cross)"
        },
    )
    ea_learnable: bool = field(
        default=False,
        metadata={"help": "learn alpha and beta of each layer, from the given values on"},
    )


EA_OPTIONS = [name for name in EATransformerConfig.__dataclass_fields__ if name.startswith("ea_")]


def check_config(cfg: EATransformerConfig) -> None:
    """Raises ValueError, naming the option, where a model cannot be built or cannot evolve."""
    try:
        check_options(cfg.ea_alpha, cfg.ea_beta, cfg.ea_kernel_size)
    except ValueError as error:
        raise ValueError(f"--ea-{str(error).replace('_', '-', 1)}") from None
    unknown = set(cfg.ea_attentions.split(",")) - set(ATTENTIONS)
    if unknown:
        raise ValueError(
            f"--ea-attentions must be a comma-separated choice of {', '.join(ATTENTIONS)}, "
            f"got {cfg.ea_attentions!r}"
        )
    for side, part in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        if part.attention_heads < 1 or part.embed_dim % part.attention_heads:
            raise ValueError(
                f"--{side}-attention-heads must be positive and divide --{side}-embed-dim "
                f"({part.embed_dim}), got {part.attention_heads}"
            )
        if part.xformers_att_config:
            raise ValueError(
                f"--{side}-xformers-att-config cannot be used: xFormers gives no map to evolve"
            )
    if cfg.base_layers:
        raise ValueError("--base-layers must be 0: a BASE layer has no attention to hand maps on")
    if cfg.cross_self_attention:
        raise ValueError(
            "--cross-self-attention cannot be used: source and target share one map there, "
            "which has no single window"
        )


@register_model("ea_transformer")
class EATransformerModel(TransformerModel):
    """fairseq's transformer whose attention maps evolve from layer to layer.

    Every option and method of :class:`fairseq.models.transformer.TransformerModel`, besides the
    ``--ea-*`` options of :class:`EATransformerConfig`. With alpha = beta = 0 it is that model.
    """

    @classmethod
    def hub_models(cls) -> Dict:
        return {}

    @classmethod
    def add_args(cls, parser) -> None:
        """Adds the options; the architectures give the defaults."""
        gen_parser_from_dataclass(
            parser, EATransformerConfig(), delete_default=True, with_prefix=""
        )

    @classmethod
    def build_model(cls, args, task):
        """Builds the model; raises ValueError, naming the option, if it cannot be."""
        names = args.keys() if isinstance(args, DictConfig) else vars(args)
        unknown = [name for name in names if name.startswith("ea_") and name not in EA_OPTIONS]
        if unknown:
            raise ValueError(
                f"no such option: {', '.join(unknown)}; there are {', '.join(EA_OPTIONS)}"
            )
        base_architecture(args)  # options that a caller or an old checkpoint left out
        cfg = EATransformerConfig.from_namespace(args)
        check_config(cfg)
        return super().build_model(cfg, task)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return EvolvingTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return EvolvingTransformerDecoder(
            cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention
        )


def register_architecture(name: str, sizes) -> None:
    """Registers `name`: the sizes set by `sizes`, and the ``--ea-*`` defaults, which a
    checkpoint keeps that way."""

    def architecture(args) -> None:
        for option in EA_OPTIONS:
            default = EATransformerConfig.__dataclass_fields__[option].default
            setattr(args, option, getattr(args, option, default))
        sizes(args)

    register_model_architecture("ea_transformer", name)(architecture)


def transformer_lite(args) -> None:
    """Transformer-Lite (paper, machine translation): 6 + 6 layers, all of width 160, 4 heads."""
    for side in ("encoder", "decoder"):
        for option, value in (("embed_dim", 160), ("ffn_embed_dim", 160), ("attention_heads", 4)):
            name = f"{side}_{option}"
            setattr(args, name, getattr(args, name, value))
    base_architecture(args)


register_architecture("ea_transformer_lite", transformer_lite)
for plain in (
    "transformer",
    "transformer_tiny",
    "transformer_iwslt_de_en",
    "transformer_wmt_en_de",
    "transformer_wmt_en_de_big",
    "transformer_vaswani_wmt_en_de_big",
    "transformer_vaswani_wmt_en_fr_big",
):
    register_architecture(f"ea_{plain}", ARCH_CONFIG_REGISTRY[plain])
