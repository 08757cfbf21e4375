"""The Python in the documents runs as it stands, and their links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from evolving_attention import AttentionEvolution, AttentionMap, reference

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
README, MAPS, SERIES = (
    re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in ("README.md", "docs/maps.md", "examples/time_series/README.md")
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (path.parent / target).exists(), target


def test_a_timm_model_and_its_maps(capsys):
    names = {"torch": torch, "images": torch.randn(2, 3, 224, 224)}
    (model,) = (text for text in README if "timm.create_model" in text)
    exec(model, names)
    assert names["model"].eval()(names["images"]).shape == (2, 10)
    exec(MAPS[0], names)
    assert capsys.readouterr().out.count("torch.Size([2, 6, 197, 197])") == 12


def test_maps_in_a_notebook():
    _, snippet = MAPS
    logits = torch.randn(2, 1, 3, 5, 5)
    maps = [AttentionMap(str(i), x, x.softmax(-1)) for i, x in enumerate(logits)]
    names = {"maps": maps, "tokens": list("abcde")}
    exec(snippet, names)
    assert names["view"].figure()._repr_png_().startswith(b"\x89PNG")


def test_layers_of_ones_own():
    """The snippet computes the equations."""
    (text,) = (text for text in README if "AttentionEvolution(" in text)
    names = {}
    torch.manual_seed(0)
    exec(text, names)
    torch.manual_seed(0)
    evolutions = [AttentionEvolution(8, alpha=0.1, beta=0.1) for _ in range(2)]
    padding = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    padding[1, ..., 7:] = True
    attn_logits = None
    for evolution in [None, *evolutions]:
        q, k, v = torch.randn(3, 2, 8, 10, 64)
        prev_attn_logits, attn_logits = attn_logits, q @ k.transpose(2, 3) / 8
        if evolution is not None:
            weights = (evolution.weight, evolution.bias, 0.1, 0.1)
            absent = padding | padding.transpose(2, 3)
            attn_logits = reference.evolve(
                attn_logits, prev_attn_logits, *weights, "bidirectional", absent
            )
    torch.testing.assert_close(names["out"], reference.attend(attn_logits, v, padding))


@pytest.mark.slow
def test_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit, export = SERIES
    names = {}
    exec(fit.replace("random_state=1", "random_state=1, n_epochs=2, n_estimators=1"), names)
    classifier, X_test = names["classifier"], list(names["X_test"][:, :, :60])
    assert classifier.predict(X_test).shape == names["y_test"].shape
    pytest.importorskip("onnxscript")
    exec(export, names)
    session = pytest.importorskip("onnxruntime").InferenceSession("motions.onnx")
    given = names["pad"](classifier.preparation_(X_test))
    (logits,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    np.testing.assert_array_equal(
        classifier.classes_[logits.argmax(axis=1)], classifier.predict(X_test)
    )
