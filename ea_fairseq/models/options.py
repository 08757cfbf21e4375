"""The ``--ea-*`` options that all models share: their names, defaults and checks."""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Mapping, Type, Union

from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    register_model_architecture,
)
from omegaconf import DictConfig

from evolving_attention.checks import check_options


@dataclass
class EvolutionConfig(FairseqDataclass):
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
    ea_learnable: bool = field(
        default=False,
        metadata={"help": "learn alpha and beta of each layer, starting from the given values"},
    )


def check_names(args: Union[Namespace, DictConfig], config: Type[EvolutionConfig]) -> None:
    """Raises ValueError for an ``ea_`` option of `args` that `config` does not have."""
    names = args.keys() if isinstance(args, DictConfig) else vars(args)
    known = [option.name for option in fields(config) if option.name.startswith("ea_")]
    unknown = [name for name in names if name.startswith("ea_") and name not in known]
    if unknown:
        raise ValueError(f"no such option: {', '.join(unknown)}; there are {', '.join(known)}")


def check_evolution(cfg: EvolutionConfig) -> None:
    """Raises ValueError, naming the option, for a value out of range."""
    try:
        check_options(cfg.ea_alpha, cfg.ea_beta, cfg.ea_kernel_size)
    except ValueError as error:
        raise ValueError(f"--ea-{str(error).replace('_', '-', 1)}") from None


def check_heads(side: str, heads: int, embed_dim: int) -> None:
    """Raises ValueError, naming the options of `side`, unless `heads` divides `embed_dim`."""
    if heads < 1 or embed_dim % heads:
        raise ValueError(
            f"--{side}-attention-heads must be positive and divide --{side}-embed-dim "
            f"({embed_dim}), got {heads}"
        )


def check_layers(cfg: EvolutionConfig, layers: Mapping[str, int]) -> None:
    """Raises ValueError if alpha or beta says that maps evolve, but there is no map that could.

    Args:
        layers: number of layers that have each attention; the first one has no previous map.
    """
    mixes = cfg.ea_learnable or cfg.ea_alpha > 0 or cfg.ea_beta > 0
    if mixes and max(layers.values()) < 2:
        numbers = ", ".join(f"{name}: {count}" for name, count in layers.items())
        raise ValueError(
            "--ea-alpha and --ea-beta must be 0 where no attention has two layers, since maps "
            f"evolve from the second layer on; layers by attention: {numbers}"
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
        sizes(args)

    register_model_architecture(model, name)(architecture)


def register_architectures_of(model: str, config: Type[EvolutionConfig]) -> None:
    """Registers each architecture of fairseq's `model` for ours, with ``ea_`` before its name."""
    for name, host in list(ARCH_MODEL_NAME_REGISTRY.items()):
        if host == model:
            sizes = ARCH_CONFIG_REGISTRY[name]
            register_architecture(f"ea_{model}", f"ea_{name}", sizes, config)


def evolution_of(options: Mapping[str, Any]) -> Dict[str, Any]:
    """The options, among those of a trained model, that say how its maps evolve.

    Options without effect are left out, so that equal results mean equal models. Of a plain model,
    alpha and beta are 0.
    """
    evolution = {name: value for name, value in options.items() if name.startswith("ea_")}
    learnable = evolution.get("ea_learnable", False)
    if not learnable and not evolution.get("ea_alpha") and not evolution.get("ea_beta"):
        return {"ea_alpha": 0.0, "ea_beta": 0.0}
    if not learnable and not evolution["ea_beta"]:
        del evolution["ea_kernel_size"]
    if "ea_attentions" in evolution:
        evolution["ea_attentions"] = ",".join(sorted(set(evolution["ea_attentions"].split(","))))
    return evolution
