"""docs/transformers.md: its Python runs as it stands, and its numbers are right."""

import re
from pathlib import Path

import torch
from transformers_models import ea_transformers, transformers

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/transformers.md").read_text(encoding="utf-8")


def test_the_snippets_run(tmp_path, monkeypatch):
    """Both ways from a checkpoint, for which a tiny one stands in."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **size))
    plain.save_pretrained(tmp_path / "bert-base-uncased")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    for text in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        names = {}
        exec(text, names)
        assert type(names["model"]) is ea_transformers.EABertForSequenceClassification
        assert names["model"].config.ea_learnable
        if "optimizer" in names:
            rest, mixing = names["optimizer"].param_groups
            assert len(mixing["params"]) == 2  # the second layer's alpha and beta
            count = len(list(names["model"].parameters()))
            assert len(rest["params"]) == count - 2


def test_the_counts_of_parameters():
    glue = (ROOT / "examples/glue/README.md").read_text(encoding="utf-8")
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
        assert row in DOCUMENT, row
        if name.startswith("BERT"):
            assert f"{counts[0]:,}" in glue and f"{counts[1] - counts[0]:,}" in glue
