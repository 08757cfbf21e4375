"""The Python in the documents runs as it stands, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("padding", [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1]])
def test_a_layer_of_ones_own(padding):
    padding = torch.tensor([[0, 0, 0, 0, 0], padding]).bool()
    q, k, v = torch.randn(3, 2, 8, 5, 4).requires_grad_().unbind(0)
    prev_attn_logits = torch.randn(2, 8, 5, 5)
    names = {"q": q, "k": k, "v": v, "head_dim": 4, "prev_attn_logits": prev_attn_logits}
    names |= {"padding": padding}
    (text,) = (text for text in README if "AttentionEvolution" in text)
    exec(text, names)
    assert names["out"].isfinite().all()
    kept = ~padding[1]
    alone = {name: x[1:, :, kept] for name, x in (("q", q), ("k", k), ("v", v))}
    alone |= {"prev_attn_logits": prev_attn_logits[1:, :, kept][..., kept], "head_dim": 4}
    alone |= {"padding": padding[1:, kept], "evolution": names["evolution"]}
    _, made, rest = text.partition("attn_logits = q")
    exec(made + rest, alone)
    torch.testing.assert_close(names["out"][1:, :, kept], alone["out"])


@pytest.mark.slow
def test_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = (text for text in SERIES if "EADCTransformerClassifier" in text)
    names = {}
    exec(text.replace("random_state=1", "random_state=1, n_epochs=2"), names)
    assert names["classifier"].predict(names["X_test"]).shape == names["y_test"].shape
