"""Shared by the benchmarks of fairseq's models: their sides, built without data."""

from __future__ import annotations

import logging
from argparse import Namespace

from common import LITERAL, OURS
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, BaseFairseqModel
from fairseq.tasks import FairseqTask
from literal import make_literal
from torch import nn

import ea_fairseq  # noqa: F401 (registers the models)

PLAIN = "fairseq"

# Here, plain weights are loaded on purpose: no warning is needed.
logging.getLogger("ea_fairseq").setLevel(logging.WARNING)


def make_dictionary(size: int) -> Dictionary:
    """A dictionary of `size` made-up words, including the special ones."""
    dictionary = Dictionary()
    for index in range(size - dictionary.nspecial):
        dictionary.add_symbol(f"w{index}")
    return dictionary


def architectures(model: type[BaseFairseqModel]) -> list[str]:
    """The architectures of fairseq's model that have a counterpart here."""
    return sorted(
        name
        for name, of in ARCH_MODEL_REGISTRY.items()
        if of is model and f"ea_{name}" in ARCH_MODEL_REGISTRY
    )


def build(arch: str, task: FairseqTask, device: str, **options) -> dict[str, nn.Module]:
    """fairseq's model `arch`, ours and the literal one, with the same weights."""
    models = {}
    for side, name in ((PLAIN, arch), (OURS, f"ea_{arch}")):
        args = Namespace(**options)
        ARCH_CONFIG_REGISTRY[name](args)
        models[side] = ARCH_MODEL_REGISTRY[name].build_model(args, task).to(device)
    models[OURS].load_state_dict(models[PLAIN].state_dict())
    models[LITERAL] = make_literal(models[OURS])
    return models
