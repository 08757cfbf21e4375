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
README, MAPS, SERIES, TRANSFORMERS = (
    re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in (
        "README.md",
        "docs/maps.md",
        "examples/time_series/README.md",
        "docs/transformers.md",
    )
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
    exec(fit.replace("random_state=1", "random_state=1, n_epochs=2"), names)
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



def test_transformers_models(tmp_path, monkeypatch):
    """Both ways from a checkpoint, for which a tiny one stands in, and the counts of parameters."""
    transformers = pytest.importorskip(
        "transformers", minversion="5.24", reason="transformers is not installed"
    )
    import ea_transformers

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **size))
    plain.save_pretrained(tmp_path / "bert-base-uncased")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    for text in TRANSFORMERS:
        names = {}
        exec(text, names)
        assert type(names["model"]) is ea_transformers.EABertForSequenceClassification
        assert names["model"].config.ea_beta == 0.1

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    large["intermediate_size"] = 4096
    roberta = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    t5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    for name, model, options in (
        ("BERT-Base", "BertModel", {}),
        ("BERT-Large", "BertModel", large),
        ("RoBERTa-Base", "RobertaModel", roberta),
        ("RoBERTa-Large", "RobertaModel", {**roberta, **large}),
        ("T5-Base", "T5ForConditionalGeneration", t5),
    ):
        counts = []
        for module, prefix in ((transformers, ""), (ea_transformers, "EA")):
            model_class = getattr(module, prefix + model)
            with torch.device("meta"):
                counts.append(model_class(model_class.config_class(**options)).num_parameters())
        row = f"| {name} | {counts[0]:,} | {counts[1] - counts[0]:,} |"
        assert row in (ROOT / "docs/transformers.md").read_text(encoding="utf-8"), row
        if name.startswith("BERT"):
            glue = (ROOT / "examples/glue/README.md").read_text(encoding="utf-8")
            assert f"{counts[0]:,}" in glue and f"{counts[1] - counts[0]:,}" in glue
