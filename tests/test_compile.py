"""torch.compile: attention never breaks the graph of a model."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

import evolving_attention
from ea_aeon.network import DCTransformer

pytestmark = pytest.mark.slow


def translation(build, sentences, task):
    model = build(encoder_layers=2, decoder_layers=2)
    return model, (sentences(2, 7), torch.tensor([7, 7]), sentences(2, 6, seed=1))


def language_understanding(build, sentences, task):
    sizes = {"encoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16}
    args = Namespace(encoder_attention_heads=4, max_positions=64, dropout=0.0, **sizes)
    ARCH_CONFIG_REGISTRY["ea_roberta"](args)
    masked_lm = MaskedLMTask(MaskedLMConfig(), task.source_dictionary)
    return ARCH_MODEL_REGISTRY["ea_roberta"].build_model(args, masked_lm).eval(), (sentences(2, 7),)


def time_series(build, sentences, task):
    return DCTransformer(3, 2, 9, num_blocks=2).eval(), (torch.randn(2, 9, 3), torch.tensor([9, 5]))


@pytest.mark.parametrize("make", [translation, language_understanding, time_series])
def test_compiled_equals_eager(make, build, sentences, task):
    model, args = make(build, sentences, task)
    expected = model(*args)
    breaks = torch._dynamo.explain(model)(*args).break_reasons
    files = {Path(frame.filename) for reason in breaks for frame in reason.user_stack}
    core = Path(evolving_attention.__file__).parent
    assert not [file for file in files if core in file.parents or "attention" in file.name]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(*args), expected)
