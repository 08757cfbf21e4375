"""The ``--ea-*`` options that all models share: their names, defaults and checks."""

import logging
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Mapping, Optional, Type, Union

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    register_model_architecture,
)
from fairseq.utils import safe_hasattr
from omegaconf import DictConfig

from evolving_attention.checks import check_flag, check_options

ATTENTIONS = ("encoder", "decoder", "cross")
KEYS = ("earlier", "centred")
logger = logging.getLogger(__name__)


@dataclass
class EvolutionConfig(FairseqDataclass):
    ea_alpha: float = field(
        default=0.1,
        metadata={"help": "weight of the previous layer's map, 0 to 1 (default: 0.1)"},
    )
    ea_beta: float = field(
        default=0.5,  # better than 0.1 in training from scratch, see docs/results.md
        metadata={"help": "weight of the convolution over the map, 0 to 1 (default: 0.5)"},
    )
    ea_kernel_size: int = field(
        default=3, metadata={"help": "size of that convolution, odd (default: 3)"}
    )
    ea_learnable: bool = field(
        default=False,
        metadata={"help": "learn alpha and beta of each layer, starting from the given values"},
    )


def add_options(parser: ArgumentParser, config: Type[FairseqDataclass]) -> None:
    """Adds the options of `config` without defaults, which the architectures give."""
    gen_parser_from_dataclass(parser, config(), delete_default=True, with_prefix="")


def check_names(args: Union[Namespace, DictConfig], config: Type[EvolutionConfig]) -> None:
    """Raises ValueError for an ``ea_`` option of `args` that `config` does not have."""
    names = args.keys() if isinstance(args, DictConfig) else vars(args)
    known = [option.name for option in fields(config) if option.name.startswith("ea_")]
    unknown = [name for name in names if name.startswith("ea_") and name not in known]
    if unknown:
        raise ValueError(f"no such option: {', '.join(unknown)}; there are {', '.join(known)}")


def check_evolution(cfg: Union[EvolutionConfig, Namespace, DictConfig]) -> None:
    """Raises ValueError, naming the option, for a value out of range or of a wrong type."""
    try:
        check_options(cfg.ea_alpha, cfg.ea_beta, cfg.ea_kernel_size)
        check_flag("learnable", cfg.ea_learnable)
    except ValueError as error:
        raise ValueError(f"--ea-{str(error).replace('_', '-', 1)}") from None
    named = getattr(cfg, "ea_attentions", "encoder")
    if not isinstance(named, str) or set(named.split(",")) - set(ATTENTIONS):
        raise ValueError(
            f"--ea-attentions must be a comma-separated choice of {', '.join(ATTENTIONS)}, "
            f"got {named!r}"
        )
    keys = getattr(cfg, "ea_keys", KEYS[0])
    if keys not in KEYS:
        raise ValueError(f"--ea-keys must be one of {', '.join(KEYS)}, got {keys!r}")


def check_heads(side: str, heads: int, embed_dim: int) -> None:
    """Raises ValueError, naming the options of `side`, unless `heads` divides `embed_dim`."""
    if heads < 1 or embed_dim % heads:
        raise ValueError(
            f"--{side}-attention-heads must be positive and divide --{side}-embed-dim "
            f"({embed_dim}), got {heads}"
        )


def depth(args: Namespace, side: str) -> int:
    """How many layers the encoder or decoder will have."""
    kept = getattr(args, f"{side}_layers_to_keep", None)
    return len(kept.split(",")) if kept else getattr(args, f"{side}_layers")


def without_effect(args: Namespace) -> Optional[str]:
    """Says which options would have no effect: no attention that they name could evolve."""
    if not (args.ea_learnable or args.ea_alpha > 0 or args.ea_beta > 0):
        return None
    layers = {"encoder": depth(args, "encoder")}
    if hasattr(args, "decoder_layers"):
        crosses = not getattr(args, "no_cross_attention", False)
        layers["decoder"] = depth(args, "decoder")
        layers["cross"] = layers["decoder"] if crosses else 0
    named = getattr(args, "ea_attentions", "encoder").split(",")
    idle = [name for name in named if layers.get(name, 2) < 2]
    if len(idle) < len(named) and set(named) == set(layers):  # the default may name too many
        return None
    if not idle:
        return None
    counts = ", ".join(f"{name}: {layers[name]}" for name in idle)
    return (
        "--ea-attentions must not name an attention that has fewer than two layers, since the "
        f"first layer has no previous map; layers by attention: {counts}. Name other attentions, "
        "or set --ea-alpha 0 --ea-beta 0 without --ea-learnable for a plain model"
    )


def register_architecture(
    model: str, name: str, sizes: Callable, config: Type[EvolutionConfig]
) -> None:
    """Registers the architecture `name` of `model`.

    `sizes` sets its sizes. It also sets the ``--ea-*`` options of `config` to their defaults, so
    that checkpoints record them.
    """

    def architecture(args: Namespace) -> None:
        for option in fields(config):
            if option.name.startswith("ea_"):
                setattr(args, option.name, getattr(args, option.name, option.default))
        for option in ("encoder_layers_to_keep", "decoder_layers_to_keep"):
            kept = getattr(args, option, None)
            if isinstance(kept, list):  # fairseq's parser makes a list, its models read a string
                setattr(args, option, ",".join(map(str, kept)))
        check_evolution(args)
        sizes(args)
        message = without_effect(args)
        if message and safe_hasattr(args, "_name"):
            # Those of a checkpoint, which must load all the same, or of fairseq-hydra-train.
            logger.warning(message)
        elif message:
            raise ValueError(message)

    register_model_architecture(model, name)(architecture)


def register_architectures_of(model: str, config: Type[EvolutionConfig]) -> None:
    """Registers each architecture of fairseq's `model` for ours, with ``ea_`` before its name."""
    for name, host in list(ARCH_MODEL_NAME_REGISTRY.items()):
        if host == model:
            sizes = ARCH_CONFIG_REGISTRY[name]
            register_architecture(f"ea_{model}", f"ea_{name}", sizes, config)


def evolution_of(options: Mapping[str, Any]) -> Dict[str, Any]:
    """The options, among those of a trained model, that say how its maps evolve.

    Options without effect are left out, so that equal results mean equal models; learned alpha and
    beta are among the weights. Of a plain model, alpha and beta are 0.
    """
    evolution = {name: value for name, value in options.items() if name.startswith("ea_")}
    learnable = evolution.get("ea_learnable", False)
    if not learnable and not evolution.get("ea_alpha") and not evolution.get("ea_beta"):
        return {"ea_alpha": 0.0, "ea_beta": 0.0}
    if learnable:
        evolution = {k: v for k, v in evolution.items() if k not in ("ea_alpha", "ea_beta")}
    elif not evolution["ea_beta"]:
        del evolution["ea_kernel_size"]
    if evolution.get("ea_keys") == KEYS[0]:  # older checkpoints do not say so
        del evolution["ea_keys"]
    if "ea_attentions" in evolution:
        evolution["ea_attentions"] = ",".join(sorted(set(evolution["ea_attentions"].split(","))))
    return evolution
