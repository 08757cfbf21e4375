"""Fixtures for several test files: real fairseq models with a small dictionary."""

import os
from argparse import Namespace
from io import BytesIO

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks.translation import TranslationConfig, TranslationTask

import ea_fairseq  # noqa: F401 (registers the models)

VOCABULARY = 60

# Threads slow down models this small, and with one, sums are the same on every machine. The
# variable is for the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def task():
    dictionary = Dictionary()
    for index in range(VOCABULARY):
        dictionary.add_symbol(f"w{index}")
    return TranslationTask(TranslationConfig(), dictionary, dictionary)


@pytest.fixture(scope="session")
def reload():
    """reload(module): a TorchScript module, saved to a file and loaded again."""

    def save_and_load(module):
        file = BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        return torch.jit.load(file)

    return save_and_load


@pytest.fixture
def build(task):
    """build(arch, **options): the model that --arch with these options gives, in eval mode."""

    def build_model(arch="ea_transformer_tiny", seed=0, **options):
        torch.manual_seed(seed)
        sizes = {"encoder_layers": 3, "decoder_layers": 3, "dropout": 0.0}
        args = Namespace(**{**sizes, **options})
        ARCH_CONFIG_REGISTRY[arch](args)
        return ARCH_MODEL_REGISTRY[arch].build_model(args, task).eval()

    return build_model


@pytest.fixture
def sentences(task):
    """sentences(batch, length, seed): random tokens without padding, (batch, length)."""

    def draw(batch, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        dictionary = task.target_dictionary
        return torch.randint(
            dictionary.nspecial, len(dictionary), (batch, length), generator=generator
        )

    return draw
