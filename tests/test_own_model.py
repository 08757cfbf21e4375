"""The models of your own in examples/ learn, check themselves, and the document about them."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import own_model_decoder as decoder  # noqa: E402
import own_model_encoder as encoder  # noqa: E402

from evolving_attention import collect_maps  # noqa: E402

EXAMPLES = sorted((ROOT / "examples").glob("own_model*.py"))
SNIPPETS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/own_model.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize("module", [encoder, decoder])
@pytest.mark.slow
def test_an_example_learns_and_passes_its_checks(module, capsys):
    module.main()
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150


@pytest.fixture
def written():
    """A decoder in float64, random sentences, and the scores of the whole pass."""
    torch.manual_seed(1)
    model = decoder.Decoder().double().eval()
    source, target = decoder.pairs(8)
    with torch.no_grad():
        whole, _ = model(source, target)
    return model, source, target, whole


@torch.no_grad()
def steps(model, source, target, caches=None):
    found = []
    for token in target.split(1, dim=1):
        scores, caches = model(source, token, caches)
        found.append(scores)
    return torch.cat(found, dim=1), caches


def test_steps_equal_the_whole_pass(written):
    model, source, target, whole = written
    torch.testing.assert_close(steps(model, source, target)[0], whole, rtol=0, atol=1e-12)


def test_no_token_sees_the_future(written):
    model, source, target, whole = written
    changed = target.clone()
    changed[:, 4:] = decoder.START
    with torch.no_grad():
        scores, _ = model(source, changed)
    torch.testing.assert_close(scores[:, :4], whole[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(scores[:, 4:], whole[:, 4:], atol=1e-3)


def test_padding_of_the_source_changes_nothing(written):
    model, source, target, whole = written
    for row, tokens, scores in zip(source, target, whole, strict=True):
        with torch.no_grad():
            alone, _ = model(row[row != decoder.PAD][None], tokens[None])
        torch.testing.assert_close(alone[0], scores, rtol=0, atol=1e-12)


def test_rows_must_go_where_the_cache_goes(written):
    """What the document says about beams and rejected tokens, and what happens otherwise."""
    model, source, target, whole = written
    _, caches = steps(model, source, target[:, :4])
    order = torch.arange(8).flip(0)

    def next_scores(caches):
        return model(source[order], target[order, 4:5], caches)[0][:, 0].detach()

    torch.testing.assert_close(next_scores(decoder.reorder(caches, order)), whole[order, 4])
    halved = [cache._replace(past=cache.past[order]) for cache in caches]
    assert (next_scores(halved) - whole[order, 4]).abs().max() > 1e-3

    _, longer = steps(model, source, torch.full_like(target[:, :2], decoder.START), caches)
    torch.testing.assert_close(model(source, target[:, 4:5], caches)[0][:, 0], whole[:, 4])
    cut = [
        cache._replace(
            past=cache.past[:, :4], rows=None if cache.rows is None else cache.rows[..., :4]
        )
        for cache in longer
    ]
    assert (model(source, target[:, 4:5], cut)[0][:, 0] - whole[:, 4]).abs().max() > 1e-3


def test_maps_of_ones_own_model():
    model = encoder.Encoder().eval()
    tokens = encoder.padded(encoder.sentences(3))
    with torch.no_grad(), collect_maps(model) as maps:
        model(tokens)
    assert [m.name for m in maps] == [f"layers.{i}.attn" for i in range(4)]
    for _, _, attn_probs in maps:
        torch.testing.assert_close(attn_probs.sum(-1), torch.ones(attn_probs.shape[:-1]))
        assert not attn_probs[(tokens == encoder.PAD)[:, None, None].expand_as(attn_probs)].any()


def test_the_document_runs_as_it_stands(capsys):
    names = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert len(SNIPPETS) >= 3
