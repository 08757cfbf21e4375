"""fairseq's commands with ea_transformer, as a user types them, on tiny data."""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq import options as fairseq_options
from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter
from fairseq.models import ARCH_MODEL_NAME_REGISTRY

import ea_fairseq.average_checkpoints as averaging
from ea_fairseq.models.ea_transformer import EATransformerModel

pytestmark = pytest.mark.slow

REPO = Path(__file__).parent.parent
USER_DIR = REPO / "ea_fairseq"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}

MODEL = [
    *("--user-dir", USER_DIR, "--arch", "ea_transformer_tiny"),
    *("--ea-alpha", 0.3, "--ea-beta", 0.4, "--share-all-embeddings"),
    *("--encoder-layers", 3, "--decoder-layers", 3),
]
TRAINING = [
    *("--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt"),
    *("--warmup-updates", 20, "--dropout", 0.0, "--criterion", "label_smoothed_cross_entropy"),
    *("--label-smoothing", 0.1, "--batch-size", 16, "--cpu", "--log-format", "json"),
    *("--num-workers", 0, "--data-buffer-size", 0, "--log-interval", 1),
]


def fairseq(tool, *args):
    """Runs fairseq-`tool` in this process; returns what it prints."""
    vars(checkpoint_utils.save_checkpoint).clear()  # as in a new process
    argv, sys.argv = sys.argv, [f"fairseq-{tool}", *map(str, args)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            importlib.import_module(f"fairseq_cli.{tool}").cli_main()
    finally:
        sys.argv = argv
    return printed.getvalue()


def command(tool, *args):
    """The command line that runs fairseq-`tool` in a process of its own."""
    return [sys.executable, "-m", f"fairseq_cli.{tool}", *map(str, args)]


def weights(checkpoint):
    return averaging.load(checkpoint)["model"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A toy language pair: the translation is the sentence backwards, each word in capitals."""
    folder = tmp_path_factory.mktemp("translation")
    rng = random.Random(0)
    for split, size in (("train", 320), ("valid", 16), ("test", 24)):
        lines = [rng.choices("abcdefghijkl", k=rng.randint(2, 7)) for _ in range(size)]
        (folder / f"{split}.de").write_text("".join(" ".join(x) + "\n" for x in lines))
        backwards = [" ".join(x[::-1]).upper() + "\n" for x in lines]
        (folder / f"{split}.en").write_text("".join(backwards))
    fairseq(
        "preprocess",
        *("--source-lang", "de", "--target-lang", "en", "--joined-dictionary"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid"),
        *("--testpref", folder / "test", "--destdir", folder / "bin"),
    )
    return folder


@pytest.fixture(scope="session")
def trained(data):
    """The folder of a model trained for 15 epochs by fairseq-train, scored by BLEU as it went."""
    folder = data / "trained"
    fairseq(
        "train",
        *(data / "bin", *MODEL, *TRAINING, "--max-epoch", 15, "--save-dir", folder),
        *("--eval-bleu", "--eval-bleu-args", '{"beam": 4, "max_len_b": 10}'),
        *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
        *("--keep-last-epochs", 2),
    )
    return folder


def generate(data, *args, paths):
    text = fairseq(
        "generate",
        *(data / "bin", "--user-dir", USER_DIR, "--path", os.pathsep.join(map(str, paths))),
        *("--cpu", "--batch-size", 8, "--max-len-b", 10, *args),
    )
    found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", text, flags=re.MULTILINE)
    return text, [(int(index), hypothesis) for index, _, hypothesis in found]


def accuracy(data, hypotheses):
    references = (data / "test.en").read_text().splitlines()
    return sum(references[i] == hypothesis for i, hypothesis in hypotheses) / len(references)


def test_train_generate_and_score(data, trained):
    text, hypotheses = generate(
        data, "--beam", 5, "--scoring", "sacrebleu", paths=[trained / "checkpoint_best.pt"]
    )
    assert "BLEU" in text
    assert accuracy(data, hypotheses) > 0.5


@pytest.mark.parametrize(
    "options",
    [
        ["--beam", 4, "--prefix-size", 2],
        ["--beam", 4, "--nbest", 4],
        ["--beam", 4, "--print-alignment", "hard"],
        ["--beam", 4, "--print-alignment", "soft"],
        ["--beam", 2, "--sampling", "--sampling-topk", 3, "--nbest", 2],
        ["--beam", 1, "--score-reference"],
        ["--beam", 4, "--no-repeat-ngram-size", 3, "--lenpen", 0.6],
        ["--beam", 4, "--no-early-stop", "--unkpen", 2],
        ["--beam", 2, "--retain-dropout"],
    ],
    ids=lambda options: " ".join(map(str, options[2:])),
)
def test_generation_options(data, trained, options):
    _, hypotheses = generate(data, *options, paths=[trained / "checkpoint_last.pt"])
    count = options[options.index("--nbest") + 1] if "--nbest" in options else 1
    assert len(hypotheses) == 24 * count
    if "--sampling" not in options:
        assert accuracy(data, hypotheses) > 0.5


def test_ensemble(data, trained):
    paths = [trained / "checkpoint14.pt", trained / "checkpoint15.pt"]
    _, hypotheses = generate(data, "--beam", 4, paths=paths)
    assert accuracy(data, hypotheses) > 0.5


@pytest.mark.parametrize(("encoder", "decoder"), [("1,2", "0,2"), ("2", "1")])
def test_layers_pruned_when_generating(data, trained, encoder, decoder):
    """LayerDrop's pruning: the layer that becomes the first drops the weights of its evolution."""
    kept = {"encoder_layers_to_keep": encoder, "decoder_layers_to_keep": decoder}
    overrides = str(kept)
    _, hypotheses = generate(
        data, "--model-overrides", overrides, paths=[trained / "checkpoint_last.pt"]
    )
    assert len(hypotheses) == 24


def test_a_pruned_model_that_is_trained_further_can_be_loaded(data, trained, tmp_path):
    arguments = (data / "bin", *MODEL, *TRAINING, "--disable-validation")
    start = ("--finetune-from-model", trained / "checkpoint_last.pt", "--save-dir")
    kept = ("--encoder-layers-to-keep", "0,2", "--decoder-layers-to-keep", "1")
    for updates in (1, 2):  # the second time, it resumes
        end = ("--max-update", updates)
        fairseq("train", *arguments, *kept, *start, tmp_path / "both", *end)
    fairseq("train", *arguments, *kept[:2], *start, tmp_path / "one", "--max-update", 1)
    fairseq("train", *arguments, *kept, "--save-dir", tmp_path / "new", "--max-update", 1)
    for name, encoder, decoder in (("both", 2, 1), ("one", 2, 3), ("new", 2, 1)):
        path = tmp_path / name / "checkpoint_last.pt"
        layers = {key.partition(".self_attn.")[0] for key in weights(path) if ".self_attn." in key}
        assert len(layers) == encoder + decoder
        assert len(generate(data, paths=[path])[1]) == 24
    kept = ("--encoder-layers-to-keep", "0", "--decoder-layers-to-keep", "1")
    with pytest.raises(ValueError, match="fewer than two layers.*encoder: 1, decoder: 1, cross: 1"):
        fairseq("train", data / "bin", *MODEL, *TRAINING, *kept)


def test_averages_of_a_training_become_a_checkpoint(trained, tmp_path):
    """One that was scored by BLEU, so that the file holds numbers of numpy's."""
    state = averaging.load(trained / "checkpoint_last.pt")
    state["extra_state"]["ema"] = {name: x + 1 for name, x in state["model"].items()}
    torch.save(state, tmp_path / "with_ema.pt")
    checkpoint_utils.save_ema_as_checkpoint(f"{tmp_path}/with_ema.pt", f"{tmp_path}/ema.pt")
    for name, weight in weights(tmp_path / "ema.pt").items():
        assert torch.equal(weight, state["model"][name] + 1)


def test_interactive_and_from_pretrained(data, trained):
    _, hypotheses = generate(data, "--beam", 4, paths=[trained / "checkpoint_best.pt"])
    sources = (data / "test.de").read_text().splitlines()
    text = fairseq(
        "interactive",
        *(data / "bin", "--user-dir", USER_DIR, "--path", trained / "checkpoint_best.pt"),
        *("--input", data / "test.de", "--cpu", "--beam", 4, "--max-len-b", 10),
        *("--buffer-size", 24, "--batch-size", 24),
    )
    interactive = re.findall(r"^H-\d+\t\S+\t(.*)$", text, flags=re.MULTILINE)
    hub = EATransformerModel.from_pretrained(
        str(trained), "checkpoint_best.pt", str(data / "bin"), user_dir=str(USER_DIR)
    )
    translated = hub.translate(sources, beam=4, max_len_b=10)
    assert interactive == translated == [hypothesis for _, hypothesis in sorted(hypotheses)]
    (model,) = hub.models
    source = hub.encode(sources[0])[None]
    batch = [source, torch.tensor([source.size(1)]), source]
    torch.testing.assert_close(torch.jit.script(model)(*batch)[0], model(*batch)[0])


def test_validate(data, trained):
    fairseq(
        "validate",
        *(data / "bin", "--user-dir", USER_DIR, "--path", trained / "checkpoint_last.pt"),
        *("--task", "translation", "--criterion", "cross_entropy", "--batch-size", 16, "--cpu"),
    )


def test_averaged_checkpoint(data, trained, tmp_path, capsys):
    output = tmp_path / "average.pt"
    first = ["--inputs", str(trained), "--num-epoch-checkpoints", "2", "--output", str(output)]
    averaging.main(first)
    assert "checkpoint15.pt" in capsys.readouterr().out
    one, two = weights(trained / "checkpoint14.pt"), weights(trained / "checkpoint15.pt")
    mean = weights(output)
    assert mean.keys() == one.keys()
    output.with_name("average.pt.part").write_text("theirs")
    same = ["--inputs", str(trained / "checkpoint15.pt"), "--output", str(output)]
    with pytest.raises(SystemExit):
        averaging.main(same)
    assert "average.pt already exists" in capsys.readouterr().err
    averaging.main([*same, "--overwrite"])
    for name, value in weights(output).items():
        torch.testing.assert_close(value, two[name], atol=0, rtol=0)
    assert output.with_name("average.pt.part").read_text() == "theirs"
    averaging.main([*first, "--overwrite"])
    for name in mean:
        torch.testing.assert_close(mean[name], (one[name] + two[name]) / 2)
    _, hypotheses = generate(data, "--beam", 4, paths=[output])
    assert accuracy(data, hypotheses) > 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--inputs", "{trained}", "--num-epoch-checkpoints", "9"], "holds 2 such checkpoints"),
        (["--inputs", "nowhere.pt"], "no such file: nowhere.pt"),
        (["--inputs", "{trained}/checkpoint15.pt", "--num-epoch-checkpoints", "1"], "one folder"),
        (["--inputs", "{trained}", "--num-update-checkpoints", "0"], "at least 1"),
        (["--inputs", "{trained}"], "is a folder: name its checkpoints"),
        (["--inputs", __file__], "is no checkpoint"),
        (["--inputs", "{trained}/checkpoint15.pt", "--num-best-checkpoints", "2"], "1 inputs"),
        (["--inputs", "{trained}/checkpoint15.pt", "--checkpoint-upper-bound", "3"], "needs"),
        (["--inputs", "{trained}/checkpoint15.pt", "--num-best-checkpoints", "1"], "named like"),
        (["--inputs", "{trained}/checkpoint15.pt", "--output", "."], ". is a folder"),
        (
            ["--inputs", "{trained}/checkpoint15.pt", "--output", __file__],
            "test_fairseq_commands.py already exists",
        ),
    ],
)
def test_averaging_says_what_is_wrong(trained, tmp_path, capsys, args, message):
    args = [arg.format(trained=trained) for arg in args]
    with pytest.raises(SystemExit) as stop:
        averaging.main(["--output", str(tmp_path / "x.pt"), *args])
    assert message in f"{stop.value}{capsys.readouterr().err}"
    assert not (tmp_path / "x.pt").exists()


def test_which_checkpoints_are_averaged(tmp_path):
    for name in ("1", "2", "3", "4", "_1_10", "_2_20", "_2_30"):
        (tmp_path / f"checkpoint{name}.pt").touch()

    def last(*options):
        return [path.stem for path in averaging.last_checkpoints(tmp_path, *options)]

    assert last(2, False, None) == ["checkpoint4", "checkpoint3"]
    assert last(2, False, 3) == ["checkpoint3", "checkpoint2"]
    assert last(2, True, None) == ["checkpoint_2_30", "checkpoint_2_20"]
    assert last(1, True, 20) == ["checkpoint_2_20"]
    paths = [tmp_path / f"checkpoint.best_loss_{value}.pt" for value in ("3.5", "12.1", "4.0")]
    assert averaging.best_checkpoints(paths, 2, maximize=False) == [paths[0], paths[2]]
    assert averaging.best_checkpoints(paths, 2, maximize=True) == [paths[1], paths[2]]


def test_the_best_checkpoints_are_those_that_the_training_called_best(trained, tmp_path, capsys):
    state = averaging.load(trained / "checkpoint15.pt")
    assert state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"]
    paths = [tmp_path / f"checkpoint.best_bleu_{bleu}.pt" for bleu in ("9.1", "30.4", "28.0")]
    for path in paths:
        torch.save(state, path)
    best = ["--num-best-checkpoints", "2", "--inputs", *map(str, paths)]
    averaging.main([*best, "--output", str(tmp_path / "high.pt")])
    printed = capsys.readouterr().out
    assert "the best are those with the highest metric" in printed
    assert "30.4" in printed and "28.0" in printed and "9.1" not in printed
    state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"] = False
    torch.save(state, paths[0])
    averaging.main([*best, "--output", str(tmp_path / "low.pt")])
    printed = capsys.readouterr().out
    assert "the best are those with the lowest metric" in printed
    assert "9.1" in printed and "28.0" in printed and "30.4" not in printed


def test_checkpoints_of_different_evolution_are_not_averaged(trained, tmp_path):
    state = averaging.load(trained / "checkpoint15.pt")
    state["cfg"]["model"].ea_alpha = 0.5
    torch.save(state, tmp_path / "other.pt")
    paths = [str(trained / "checkpoint15.pt"), str(tmp_path / "other.pt")]
    with pytest.raises(SystemExit, match=r"--ea-alpha 0\.5 .*but .*--ea-alpha 0\.3"):
        averaging.main(["--inputs", *paths, "--output", str(tmp_path / "mean.pt")])
    assert not (tmp_path / "mean.pt").exists()


@pytest.mark.parametrize("content", [b"", b"hello world", {}, {"model": None}, {"model": {"a": 1}}])
def test_averaging_refuses_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit, match="bad.pt is no checkpoint"):
        averaging.main(["--inputs", str(path), "--output", str(tmp_path / "x.pt")])


def losses(log):
    """{update: loss} from the JSON lines of a training log."""
    lines = map(json.loads, re.findall(r"\{.*\"num_updates\".*\}", log))
    return {int(line["num_updates"]): float(line["loss"]) for line in lines if "loss" in line}


def test_resume_after_a_kill_continues_as_if_unbroken(data, tmp_path):
    """Killed between two checkpoints, resumed: the same losses, the same weights."""
    arguments = [
        *(data / "bin", *MODEL, *TRAINING, "--max-update", 60, "--dropout", 0.1),
        *("--save-interval-updates", 10, "--no-epoch-checkpoints", "--disable-validation"),
    ]

    def training(folder):
        return command("train", *arguments, "--save-dir", tmp_path / folder)

    unbroken = subprocess.run(
        training("unbroken"), capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    process = subprocess.Popen(
        training("broken"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    for line in process.stdout:
        if "Saved checkpoint" in line:  # logged when its copies are complete
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = subprocess.run(
        training("broken"), capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    expected, got = (
        losses("\n".join(line for line in run.stdout.splitlines() if "train_inner" in line))
        for run in (unbroken, resumed)
    )
    assert 1 not in got
    assert max(got) == max(expected) == 60
    assert got == {update: loss for update, loss in expected.items() if update >= min(got)}
    expected = weights(tmp_path / "unbroken" / "checkpoint_last.pt")
    for name, weight in weights(tmp_path / "broken" / "checkpoint_last.pt").items():
        assert torch.equal(weight, expected[name]), name


def finetuned(data, folder, start, *options):
    """The weights after one update, too small to see, from the checkpoint `start` on."""
    fairseq(
        "train",
        *(data / "bin", *MODEL, *TRAINING, "--lr", 1e-30, "--max-update", 1, *options),
        *("--finetune-from-model", start, "--save-dir", folder, "--disable-validation"),
    )
    return weights(folder / "checkpoint_last.pt")


def test_finetune_from_plain_and_from_other_evolving_checkpoints(data, trained, tmp_path):
    plain_model = [arg if arg != "ea_transformer_tiny" else "transformer_tiny" for arg in MODEL]
    plain_model = [arg for arg in plain_model if arg not in ("--ea-alpha", "--ea-beta", 0.3, 0.4)]
    fairseq(
        "train",
        *(data / "bin", *plain_model, *TRAINING, "--max-update", 3),
        *("--save-dir", tmp_path / "plain", "--disable-validation"),
    )
    start = weights(tmp_path / "plain" / "checkpoint_last.pt")
    got = finetuned(data, tmp_path / "a", tmp_path / "plain" / "checkpoint_last.pt")
    fresh = {name for name in got if name not in start}
    assert len(fresh) == 4 * 6  # weight, bias, alpha and beta of six attentions
    assert all(".evolution." in name for name in fresh)
    assert start.keys() <= got.keys()
    for name, weight in start.items():
        assert torch.equal(got[name], weight), name

    start = weights(trained / "checkpoint_last.pt")
    got = finetuned(data, tmp_path / "b", trained / "checkpoint_last.pt", "--ea-learnable")
    assert got.keys() == start.keys()
    for name, weight in start.items():
        assert torch.equal(got[name], weight), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ea-alpha", 0.1], r"evolution\.alpha is 0\.3 in the checkpoint, .*alpha=0\.1"),
        (["--ea-beta", 0.5], r"evolution\.beta is 0\.4 in the checkpoint, .*beta=0\.5"),
        (
            ["--ea-alpha", 0, "--ea-beta", 0],
            r"trained with alpha=0\.3, beta=0\.4 .* no map evolves",
        ),
        (["--ea-kernel-size", 5], "trained with kernel_size=3, .* made with kernel_size=5"),
        (["--ea-attentions", "cross"], r"Unexpected key.*self_attn\.evolution\.weight"),
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_weights_go_with_the_options_that_they_were_trained_with(
    data, trained, tmp_path, options, message, resume
):
    start = trained / "checkpoint_last.pt"
    if resume:
        shutil.copy(start, tmp_path / "checkpoint_last.pt")
    with pytest.raises(Exception, match="architectures match") as error:
        fairseq(
            "train",
            *(data / "bin", *MODEL, *TRAINING, "--max-update", 1, *options),
            *([] if resume else ["--finetune-from-model", start]),
            *("--save-dir", tmp_path, "--disable-validation"),
        )
    assert re.search(message, str(error.value.__context__), flags=re.DOTALL)


def test_generation_with_another_alpha_is_refused(data, trained):
    path = trained / "checkpoint_last.pt"
    with pytest.raises(RuntimeError, match=r"alpha is 0\.3 in the checkpoint.*alpha=0\.2"):
        generate(data, "--model-overrides", "{'ea_alpha': 0.2}", paths=[path])


@pytest.mark.parametrize("module", ["fairseq.meters", "fairseq.logging.meters"])
def test_a_checkpoint_with_the_meters_of_old_fairseq(data, trained, tmp_path, monkeypatch, module):
    meters = {"loss": AverageMeter(), "wall": TimeMeter(), "train_wall": StopwatchMeter()}
    meters["loss"].update(2.5)
    for meter in meters.values():
        monkeypatch.setattr(type(meter), "__module__", module)
    state = averaging.load(trained / "checkpoint_last.pt")
    state["extra_state"]["train_meters"] = meters
    torch.save(state, tmp_path / "old.pt")
    monkeypatch.undo()
    start = weights(tmp_path / "old.pt")
    got = finetuned(data, tmp_path / "new", tmp_path / "old.pt")
    for name, weight in start.items():
        assert torch.equal(got[name], weight), name
    averaging.main(["--inputs", str(tmp_path / "old.pt"), "--output", str(tmp_path / "mean.pt")])
    kept = averaging.load(tmp_path / "mean.pt")["extra_state"]["train_meters"]["loss"]
    assert kept == {"round": None, "val": 2.5, "sum": 2.5, "count": 1}


def test_a_checkpoint_of_another_model_is_refused(data, trained, tmp_path):
    with pytest.raises(Exception, match="architectures match"):
        finetuned(data, tmp_path, trained / "checkpoint_last.pt", "--ea-kernel-size", 5)
    with pytest.raises(Exception, match="architectures match"):
        finetuned(data, tmp_path, trained / "checkpoint_last.pt", "--encoder-layers", 4)


@pytest.mark.parametrize(
    "options",
    [
        ["--amp"],
        ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 1],
        ["--checkpoint-activations"],
        ["--encoder-layerdrop", 0.9, "--decoder-layerdrop", 0.9],
        ["--quant-noise-pq", 0.1, "--quant-noise-pq-block-size", 8],
        ["--ea-learnable"],
        ["--ea-alpha", 0, "--ea-beta", 0],
        ["--adaptive-softmax-cutoff", "5,10", "--criterion", "adaptive_loss"],
        ["--update-freq", 2, "--clip-norm", 0.1],
        ["--left-pad-source", "--left-pad-target"],
        ["--store-ema"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_training_options(data, tmp_path, caplog, options):
    model, training = MODEL, TRAINING
    if "adaptive_loss" in options:
        model = [arg for arg in MODEL if arg != "--share-all-embeddings"]
        at = TRAINING.index("--criterion")
        training = [*TRAINING[:at], *TRAINING[at + 4 :], "--ddp-backend", "legacy_ddp"]
    caplog.set_level("INFO")
    fairseq(
        "train",
        *(data / "bin", *model, *training, *options, "--max-update", 4),
        *("--save-dir", tmp_path),
    )
    got = losses("\n".join(r.getMessage() for r in caplog.records if r.name == "train_inner"))
    assert len(got) == 4
    assert all(0 < loss < 20 for loss in got.values())
    assert all(w.isfinite().all() for w in weights(tmp_path / "checkpoint_last.pt").values())


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_hydra(data, tmp_path, form):
    sizes = {
        "flat": ["+model.encoder_layers=2", "+model.encoder_embed_dim=32"],
        "nested": ["+model.encoder.layers=2", "+model.encoder.embed_dim=32"],
    }[form]
    if form == "nested":
        sizes += ["+model.decoder.embed_dim=32", "+model.decoder.layers=2"]
        sizes += ["+model.decoder.input_dim=32", "+model.decoder.output_dim=32"]
    overrides = [
        f"common.user_dir={USER_DIR}",
        "common.cpu=true",
        "common.bf16=true",
        f"checkpoint.save_dir={tmp_path}",
        "dataset.batch_size=16",
        "dataset.num_workers=0",
        "dataset.data_buffer_size=0",
        "optimization.max_update=2",
        "optimization.lr=[0.001]",
        "task=translation",
        f"task.data={data / 'bin'}",
        "+task.source_lang=de",
        "+task.target_lang=en",
        "criterion=cross_entropy",
        "optimizer=adam",
        "lr_scheduler=fixed",
        "+model._name=ea_transformer_tiny",
        "+model.ea_alpha=0.25",
        "+model.share_all_embeddings=true",
        *sizes,
    ]
    result = subprocess.run(
        [*command("hydra_train"), *overrides, f"hydra.run.dir={tmp_path}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    names = weights(tmp_path / "checkpoint_last.pt")
    assert names["encoder.embed_tokens.weight"].shape[1] == 32
    assert "encoder.layers.1.self_attn.evolution.weight" in names
    assert "encoder.layers.2.self_attn.q_proj.weight" not in names
    models, cfg, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "checkpoint_last.pt")]
    )
    assert cfg.model.ea_alpha == 0.25
    assert models[0].encoder.layers[1].self_attn.evolution.alpha == 0.25


def test_two_processes_learn_as_one(data, tmp_path):
    """Two DDP ranks on the CPU, interrupted: the weights of one that adds up two batches a step."""
    arguments = [data / "bin", *MODEL, *TRAINING, "--disable-validation"]
    for updates in (2, 3):  # the second time, they resume
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            subprocess.Popen(
                command(
                    "train",
                    *(*arguments, "--save-dir", tmp_path / "two", "--distributed-world-size", 2),
                    *("--distributed-rank", rank, "--distributed-no-spawn", "--ddp-backend"),
                    *("legacy_ddp", "--distributed-backend", "gloo", "--max-update", updates),
                    *("--distributed-init-method", f"tcp://127.0.0.1:{port}"),
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=ENVIRONMENT,
            )
            for rank in range(2)
        ]
        logs = [rank.communicate(timeout=240)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(logs)
    one = (*arguments, "--save-dir", tmp_path / "one", "--update-freq", 2, "--max-update", 3)
    fairseq("train", *one)
    expected = weights(tmp_path / "one" / "checkpoint_last.pt")
    got = weights(tmp_path / "two" / "checkpoint_last.pt")
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-5)


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, line):
        self.line = line

    def __reduce__(self):
        return os.system, (self.line,)


def test_a_checkpoint_that_carries_code_is_refused_at_every_door(data, trained, tmp_path):
    mark, bad = tmp_path / "it-ran", tmp_path / "bad.pt"
    state = averaging.load(trained / "checkpoint_last.pt")
    state["extra_state"]["surprise"] = Command(f"touch {mark}")
    torch.save(state, bad)
    doors = {
        "generate": lambda: generate(data, paths=[bad]),
        "interactive": lambda: fairseq(
            "interactive",
            *(data / "bin", "--user-dir", USER_DIR, "--path", bad, "--cpu"),
            *("--input", data / "test.de"),
        ),
        "validate": lambda: fairseq(
            "validate",
            *(data / "bin", "--user-dir", USER_DIR, "--path", bad, "--cpu"),
            *("--task", "translation", "--batch-size", 8),
        ),
        "finetune": lambda: finetuned(data, tmp_path / "f", bad),
        "resume": lambda: fairseq(
            "train",
            *(data / "bin", *MODEL, *TRAINING, "--restore-file", bad),
            *("--save-dir", tmp_path / "r"),
        ),
        "average": lambda: averaging.main(
            ["--inputs", str(bad), "--output", str(tmp_path / "a.pt")]
        ),
        "from_pretrained": lambda: EATransformerModel.from_pretrained(
            str(tmp_path), "bad.pt", str(data / "bin")
        ),
    }
    for name, door in doors.items():
        with pytest.raises(BaseException) as refusal:
            door()
        assert "weights_only" in str(refusal.value).lower(), f"{name}: {refusal.value!r}"
        assert not mark.exists(), name


class Forged:
    """Becomes, when unpickled, an array whose dtype claims that its bytes are objects."""

    def __reduce__(self):
        return np.ndarray, ((0,), ForgedDtype(), b"")


class ForgedDtype:
    def __reduce__(self):
        state = (3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 0)
        return np.dtype, ("i8", False, True), state


def test_numbers_of_a_checkpoint_are_numbers(tmp_path):
    """What --eval-bleu saves loads again, even after being saved twice; other arrays do not."""
    numbers = {
        "counts": np.arange(6).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "score": np.float64(0.5),
        "number": np.int64(7),
    }
    path = tmp_path / "numbers.pt"
    for _ in range(2):
        torch.save({"model": {}, "extra_state": numbers}, path)
        got = averaging.load(path)["extra_state"]
        for name, value in numbers.items():
            assert np.array_equal(got[name], value)
            assert got[name].dtype == value.dtype
        numbers = {"sum": got["counts"] + got["counts"], **got}
    for bad in (
        ForgedDtype(),
        Forged(),
        np.array([print], dtype=object),
        np.zeros(2, dtype="f4"),
        np.zeros(2, dtype=">i8"),
        np.zeros(2, dtype=[("a", "i8")]),
    ):
        torch.save({"model": {}, "extra_state": bad}, path)
        with pytest.raises(ValueError, match="could run code"):
            averaging.load(path)


def test_other_files_of_numbers_load_as_before(tmp_path):
    """Beside fairseq's checkpoints, numpy's names are numpy's own, as transformers needs them."""
    allowed = torch.serialization.get_safe_globals()
    assert not [x for x in allowed if isinstance(x, tuple) and x[1].startswith("numpy.")]
    state = np.random.RandomState(1).get_state()
    torch.save(state, tmp_path / "random_state.pt")
    allowed = [state[1].__reduce__()[0], np.ndarray, np.dtype, type(state[1].dtype)]
    with torch.serialization.safe_globals(allowed):
        again = torch.load(tmp_path / "random_state.pt", weights_only=True)
    assert type(again[1]) is np.ndarray and np.array_equal(again[1], state[1])


def test_timms_loading_takes_nothing_away(trained):
    """Both toolkits in one process: timm allows a checkpoint's options only for its own loads."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        pass
    assert averaging.load(trained / "checkpoint_best.pt")["model"]


def test_resuming_with_bleu(data, trained, tmp_path):
    """The n-gram counts that a checkpoint holds are continued."""
    shutil.copytree(trained, tmp_path / "again")
    fairseq(
        "train",
        *(data / "bin", *MODEL, *TRAINING, "--max-epoch", 16, "--save-dir", tmp_path / "again"),
        *("--eval-bleu", "--eval-bleu-args", '{"beam": 4, "max_len_b": 10}'),
    )
    state = averaging.load(tmp_path / "again" / "checkpoint_last.pt")
    assert state["extra_state"]["train_iterator"]["epoch"] == 17
    averaging.load(tmp_path / "again" / "checkpoint_last.pt")


PLAIN_MODEL = {
    "ea_transformer": "transformer",
    "ea_transformer_align": "transformer_align",
    "ea_multilingual_transformer": "multilingual_transformer",
    "ea_roberta": "roberta",
}


def test_the_layers_of_a_multilingual_model_are_not_pruned(data):
    with pytest.raises(ValueError, match="--decoder-layers-to-keep cannot be used with ea_multil"):
        fairseq(
            "train",
            *(data / "bin", "--user-dir", USER_DIR, "--arch", "ea_multilingual_transformer"),
            *(*TRAINING, *SMALL, "--task", "multilingual_translation", "--lang-pairs", "de-en"),
            *("--encoder-layers", 3, "--decoder-layers-to-keep", "0,1"),
        )


def test_every_architecture_of_the_hosts_is_registered():
    for ours, plain in PLAIN_MODEL.items():
        hosts = {name for name, model in ARCH_MODEL_NAME_REGISTRY.items() if model == plain}
        found = {name for name, model in ARCH_MODEL_NAME_REGISTRY.items() if model == ours}
        assert len(hosts) > 1
        assert {f"ea_{name}" for name in hosts} <= found
    assert ARCH_MODEL_NAME_REGISTRY["ea_transformer_wmt_en_de_big_t2t"] == "ea_transformer"
    assert ARCH_MODEL_NAME_REGISTRY["ea_xlm"] == "ea_roberta"


SIZES = [f"--{side}-{x}" for side in ("encoder", "decoder") for x in ("embed-dim", "ffn-embed-dim")]
SMALL = [argument for option in SIZES for argument in (option, 32)]
SMALL += ["--encoder-layers", 2, "--decoder-layers", 2]
SMALL += ["--encoder-attention-heads", 2, "--decoder-attention-heads", 2]


@pytest.mark.parametrize(
    ("plain", "options"),
    [
        ("transformer_wmt_en_de_big_t2t", ["--share-all-embeddings"]),
        ("transformer_iwslt_de_en", ["--share-decoder-input-output-embed"]),
        ("transformer_align", ["--alignment-layer", 1]),
        (
            "multilingual_transformer",
            ["--task", "multilingual_translation", "--lang-pairs", "de-en", "--share-encoders"],
        ),
    ],
)
def test_a_checkpoint_saves_the_options_that_the_plain_model_saves(data, tmp_path, plain, options):
    saved = {}
    for arch in (plain, f"ea_{plain}"):
        fairseq(
            "train",
            *(data / "bin", "--user-dir", USER_DIR, "--arch", arch, *TRAINING, *SMALL, *options),
            *("--max-update", 1, "--disable-validation", "--save-dir", tmp_path / arch),
        )
        state = averaging.load(tmp_path / arch / "checkpoint_last.pt")
        saved[arch] = dict(vars(state["cfg"]["model"]))
    plain_options, ours = saved.values()
    evolution = {name: value for name, value in ours.items() if name.startswith("ea_")}
    assert evolution == {
        "ea_alpha": 0.1,
        "ea_beta": 0.5,
        "ea_kernel_size": 3,
        "ea_learnable": False,
        "ea_attentions": "encoder,decoder,cross",
        "ea_keys": "earlier",
    }
    for name, value in plain_options.items():
        assert name in ("_name", "arch", "save_dir") or ours[name] == value, name
    names = {name for name in state["model"] if ".evolution." in name}
    assert len(names) == 3 * 4  # weight, bias, alpha, beta of the second layers' attentions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-cross-attention", "--ea-attentions", "cross"], "attention: cross: 0. Name"),
        (["--no-cross-attention", "--ea-attentions", "encoder,cross"], "attention: cross: 0. Name"),
        (["--encoder-layers", 1, "--ea-attentions", "encoder"], "encoder: 1"),
        (["--encoder-layers", 1, "--ea-attentions", "cross,encoder"], "attention: encoder: 1. "),
        (["--encoder-layers", 1, "--decoder-layers", 1], "encoder: 1, decoder: 1, cross: 1"),
    ],
)
def test_options_without_effect_are_refused(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fairseq(
            "train",
            *(data / "bin", *MODEL, *TRAINING, *options, "--save-dir", tmp_path),
        )


def test_a_checkpoint_of_options_without_effect_loads(data, tmp_path, caplog):
    """As those of version 0.1.0 that were trained before the check."""
    options = ["--encoder-layers", 1, "--decoder-layers", 1, "--ea-alpha", 0, "--ea-beta", 0]
    fairseq(
        "train",
        *(data / "bin", *MODEL, *TRAINING, *options, "--max-update", 1),
        *("--disable-validation", "--save-dir", tmp_path),
    )
    path = tmp_path / "checkpoint_last.pt"
    state = averaging.load(path)
    state["cfg"]["model"].ea_alpha = state["cfg"]["model"].ea_beta = 0.1
    torch.save(state, path)
    _, hypotheses = generate(data, "--beam", 2, paths=[path])
    assert len(hypotheses) == 24
    assert "must not name an attention that has fewer than two layers" in caplog.text


def test_no_cross_attention_trains(data, tmp_path):
    fairseq(
        "train",
        *(data / "bin", *MODEL, *TRAINING, "--no-cross-attention", "--max-update", 1),
        *("--disable-validation", "--save-dir", tmp_path),
    )
    names = weights(tmp_path / "checkpoint_last.pt")
    assert any("self_attn.evolution" in name for name in names)
    assert not any("encoder_attn" in name for name in names)


def test_a_user_dir_of_another_name(data, tmp_path):
    link, copy = tmp_path / "my_plugins", tmp_path / "my_copy"
    link.symlink_to(USER_DIR)
    shutil.copytree(USER_DIR, copy)
    training = ["--max-update", 1, "--disable-validation", "--save-dir", tmp_path / "checkpoints"]
    for folder, message in ((link, None), (copy, f"use --user-dir {USER_DIR}")):
        arguments = [data / "bin", *MODEL, *TRAINING, *training]
        arguments[arguments.index(USER_DIR)] = folder
        result = subprocess.run(
            command("train", *arguments), capture_output=True, text=True, env=ENVIRONMENT
        )
        assert (result.returncode == 0) == (message is None), result.stderr
        assert message is None or message in result.stderr
    assert (tmp_path / "checkpoints" / "checkpoint_last.pt").exists()


def test_other_programs_may_have_an_option_a(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "-a"])
    arguments = ["data", "--arch", "ea_transformer_tiny", "--optimizer", "adam"]
    parser = fairseq_options.get_training_parser()
    args = fairseq_options.parse_args_and_arch(parser, input_args=arguments)
    assert args.ea_alpha == 0.1


def test_help_shows_every_option():
    result = subprocess.run(
        command("train", "--user-dir", USER_DIR, "--arch", "ea_transformer", "--help"),
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("alpha", "beta", "kernel-size", "attentions", "learnable"):
        assert f"--ea-{option}" in result.stdout
    assert "--encoder-embed-dim" in result.stdout
