"""The README's Python is right as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def snippet(about):
    (found,) = (text for text in SNIPPETS if about in text)
    return found


def test_every_snippet_is_here():
    assert len(SNIPPETS) == 4


def test_a_timm_model_and_its_maps(capsys):
    names = {"torch": torch, "images": torch.randn(2, 3, 224, 224)}
    exec(snippet("timm.create_model"), names)
    assert names["model"].eval()(names["images"]).shape == (2, 10)
    exec(snippet("collect_maps"), names)
    assert capsys.readouterr().out.count("torch.Size([2, 6, 197, 197])") == 12


@pytest.mark.parametrize("padding", [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1]])
def test_a_layer_of_ones_own(padding):
    padding = torch.tensor([[0, 0, 0, 0, 0], padding]).bool()
    q, k, v = torch.randn(3, 2, 8, 5, 4).requires_grad_().unbind(0)
    prev_attn_logits = torch.randn(2, 8, 5, 5)
    names = {"q": q, "k": k, "v": v, "head_dim": 4, "prev_attn_logits": prev_attn_logits}
    names |= {"padding": padding}
    text = snippet("AttentionEvolution")
    exec(text, names)
    assert names["out"].isfinite().all()
    kept = ~padding[1]
    alone = {name: x[1:, :, kept] for name, x in (("q", q), ("k", k), ("v", v))}
    alone |= {"prev_attn_logits": prev_attn_logits[1:, :, kept][..., kept], "head_dim": 4}
    alone |= {"padding": padding[1:, kept], "evolution": names["evolution"]}
    _, made, rest = text.partition("attn_logits = q")
    exec(made + rest, alone)
    torch.testing.assert_close(names["out"][1:, :, kept], alone["out"])


def test_a_classifier():
    generator = np.random.default_rng(0)
    y = np.array(["up", "down"] * 6)
    X = [
        (1 if label == "up" else -1) * np.linspace(-1, 1, 9 + index)[None]
        + 0.1 * generator.standard_normal((1, 9 + index))
        for index, label in enumerate(y)
    ]
    names = {"X": X, "y": y}
    exec(snippet("EADCTransformerClassifier"), names)
    assert names["classifier"].score(X, y) > 0.8
