"""The reported results are what the JSON files say, and their trainings are paired."""

import dataclasses
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "results"))

import picture  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from experiment import ExperimentError, python, set_start  # noqa: E402
from experiments import EXPERIMENTS  # noqa: E402
from with_timm import MEAN, STD, read_images  # noqa: E402
from with_transformers import STS_B_PAIRS, Example, split_sts_b  # noqa: E402

import ea_fairseq  # noqa: E402, F401 (makes checkpoints loadable)
from evolving_attention import WINDOWS, AttentionEvolution, collect_maps  # noqa: E402


def test_the_documents_say_what_the_results_say():
    for path, text in report.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run examples/results/report.py"


def test_every_result_belongs_to_an_experiment():
    for path in report.RESULTS.glob("*/*.json"):
        setting, _, seed = path.stem.rpartition("-seed")
        experiment = EXPERIMENTS[path.parent.name]
        assert setting in experiment.settings
        assert int(seed) in experiment.seeds
        result = json.loads(path.read_text(encoding="utf-8"))
        assert (result["setting"], result["seed"]) == (setting, int(seed))
        assert set(result["scores"]) == set(experiment.scores)


def test_a_repetition_is_compared_with_the_results(tmp_path, monkeypatch, capsys):
    name = "masked-lm-captions"
    (tmp_path / name).mkdir()
    for setting, change in (("plain", 0.0), ("evolving", 1.0)):
        text = (report.RESULTS / name / f"{setting}-seed1.json").read_text(encoding="utf-8")
        result = json.loads(text)
        result["scores"]["validation loss, bits"] += change
        (tmp_path / name / f"{setting}-seed1.json").write_text(json.dumps(result))
    for path in list((tmp_path / name).iterdir()):  # any seed will do
        path.rename(path.with_name(path.name.replace("seed1", "seed11")))
    for folder, expected in ((tmp_path, "outside"), (report.RESULTS, "inside")):
        monkeypatch.setattr(sys, "argv", ["report.py", "--again", str(folder)])
        report.main()
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"{name}, evolving, validation loss, bits: ") and expected in first
    monkeypatch.setattr(sys, "argv", ["report.py", "--again", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        report.main()
    assert "has no pair" in capsys.readouterr().err


def results(values):
    return {seed: {"scores": {"loss": x}} for seed, x in values.items()}


def test_comparison():
    plain = results({1: 5.0, 2: 6.0, 3: 7.0, 4: 9.0})
    ours = results({1: 4.0, 2: 4.0, 3: 4.0, 5: 0.0})
    found = report.compare(plain, ours, "loss")
    assert found.seeds == [1, 2, 3]
    assert (found.other, found.ours, found.difference) == (6.0, 4.0, -2.0)
    np.testing.assert_allclose(found.error, 1 / 3**0.5)
    np.testing.assert_allclose(found.interval, 4.302653 / 3**0.5, rtol=1e-6)  # t, 2 degrees
    assert found.verdict(lower_is_better=True) == "no clear difference"
    found.interval = 1.9
    assert found.verdict(lower_is_better=True) == "better"
    assert found.verdict(lower_is_better=False) == "worse"
    diverged = report.compare(plain, results({1: 4.0, 2: math.nan}), "loss")
    assert diverged.verdict(lower_is_better=False) == "no clear difference"
    one = report.compare(results({1: 5.0}), results({1: 4.0}), "loss")
    assert (one.error, one.interval) == (None, None)
    assert one.verdict(lower_is_better=True) == "single pair"
    assert report.compare(plain, results({7: 1.0}), "loss") is None


def test_the_summary_has_a_row_for_each_score(tmp_path, monkeypatch):
    experiment = EXPERIMENTS["translation"]
    names = experiment.scores
    times = {"setting": experiment.default, "seconds": [[2.0, 3.0], [4.0, 5.0], [5.0, 5.0]]}
    content = {**times, "machine": {"processor": "a processor"}}
    (tmp_path / "translation.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def side(first, second):
        return {
            seed: {**result, "scores": dict(zip(names, (1.0, first, second + seed), strict=True))}
            for seed, result in results({1: 0.0, 2: 0.0}).items()
        }

    plain = side(40.0, 30.0)
    first, second = report.summary(
        experiment, {"plain": plain, experiment.default: side(39.0, 31.0)}
    )
    assert first == (
        f"| {experiment.title} | BLEU test_2016_flickr ↑ | 0.1, 0.5 | 40.00 | 39.00 | "
        "-1.00 ± 0.00 | 2 | worse | 1.25 (1.00 to 1.50) |"
    )
    assert second == (
        "|  | BLEU test_2017_flickr ↑ | 0.1, 0.5 | 31.50 | 32.50 | +1.00 ± 0.00 | 2 | better |  |"
    )


def test_settings_are_compared_with_the_plain_model_and_with_the_defaults():
    experiment = dataclasses.replace(EXPERIMENTS["translation-ablations"], scores=("loss",))
    found = {
        "plain": results({1: 5.0, 2: 6.0}),
        "evolving": results({1: 4.5, 2: 5.51}),
        "alpha-0.5": results({1: 4.0, 2: 5.0}),
        "kernel-5": results({1: 4.0}),
    }
    rows = (
        [cell.strip() for cell in row.split("|")] for row in report.table(experiment, found)[2:]
    )
    evolving, alpha, kernel = rows
    assert evolving[9:11] == ["better", ""]
    assert alpha[9:11] == ["better", "-0.505 ± 0.005, better"]
    assert kernel[9:11] == ["single pair", "-0.500"]


@pytest.mark.parametrize(
    ("lower_is_better", "ours", "share"),
    [
        (True, [(10, 9.0), (20, 5.0), (40, 1.0)], 0.75),
        (True, [(10, 9.0), (20, 8.0), (40, 3.5)], None),
        (True, [(10, 2.0), (20, 5.0), (40, 1.0)], 0.25),
        (False, [(10, 1.0), (20, 2.0), (40, 4.0)], 0.75),
        (False, [(10, 1.0), (20, 2.0), (40, 2.5)], None),
    ],
)
def test_how_early_a_score_is_reached(lower_is_better, ours, share):
    experiment = dataclasses.replace(
        EXPERIMENTS["images"], lower_is_better=lower_is_better, scores=("it",)
    )
    plain = {"curve": [(10, 6.0), (40, 3.0)]}
    assert report.reached(experiment, plain, {"curve": ours}) == share
    found = {"plain": {1: plain}, "evolving": {1: {"curve": ours}}}
    sentence = report.speed(experiment, found)
    end = "in none of 1 pair." if share is None else f"after {100 * share:.0f} % of the updates"
    assert end in sentence and "final it of plain" in sentence


def test_results_of_other_options_are_refused(tmp_path, monkeypatch, capsys):
    experiment = EXPERIMENTS["images"]
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "evolving-seed1.json"
    path.write_text(json.dumps({"options": {"alpha": 0.7}}))
    with pytest.raises(ValueError, match="evolving-seed1.json has options"):
        report.read(tmp_path, experiment)
    monkeypatch.setattr(sys, "argv", ["report.py", "--again", str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main()
    assert "error: --again: " in capsys.readouterr().err


def test_only_pairs_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    experiment = EXPERIMENTS["images"]
    (tmp_path / "images").mkdir()
    for setting, seed in (("plain", 1), ("residual", 1), ("evolving", 2), ("evolving", 1)):
        assert report.finished() == []
        path = tmp_path / "images" / f"{setting}-seed{seed}.json"
        path.write_text(json.dumps({"options": experiment.settings[setting]}))
    assert [experiment for experiment, _ in report.finished()] == [experiment]


def test_a_folder_of_others_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train.en").write_text("theirs")
    arguments = ["images", "--data", tmp_path / "none", "--out", tmp_path / "json", "--work"]

    def error_of(work):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments), str(work)])
        with pytest.raises(SystemExit) as caught:
            run.main()
        return str(caught.value)

    assert "is not empty and was not made by this script" in error_of(tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["train.en"]
    assert "File exists" in error_of(tmp_path / "theirs" / "train.en")
    for _ in range(2):  # it is ours the second time
        assert "--data: there is no" in error_of(tmp_path / "work")


def test_a_folder_prepared_from_other_data_is_refused(tmp_path):
    run.claim(tmp_path / "work", tmp_path / "mine")
    run.claim(tmp_path / "work", tmp_path / "mine")
    run.claim(tmp_path / "work", tmp_path / "mistyped")  # nothing has been prepared yet
    run.claim(tmp_path / "work", tmp_path / "mine")
    (tmp_path / "work" / "cifar10.pt").touch()
    run.claim(tmp_path / "work", tmp_path / "mine")
    with pytest.raises(ExperimentError, match="prepared from .*mine; give another folder for .*yo"):
        run.claim(tmp_path / "work", tmp_path / "yours")


@pytest.mark.parametrize("option", ["--out", "--keep"])
def test_what_cannot_be_written_is_said_before_a_training(tmp_path, monkeypatch, option):
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it trains"))
    arguments = ["run.py", "images", "--data", tmp_path, "--work", tmp_path / "work"]
    arguments += ["--out", tmp_path / "json", option, tmp_path / "file"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit, match=f"run.py: error: .*{tmp_path / 'file'}"):
        run.main()


def test_a_job_that_is_named_twice_runs_once(tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(run, "run", lambda job, *_: jobs.append(job[1:]))
    arguments = ["run.py", "images", "--data", tmp_path, "--work", tmp_path / "work"]
    arguments += ["--out", tmp_path / "json", "--seeds", 2, 2, "--settings", "plain", "plain"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    run.main()
    assert jobs == [("plain", 2)]


def test_images_from_a_folder_or_an_archive(tmp_path):
    folder = tmp_path / "cifar10"
    with pytest.raises(ExperimentError, match="no .*cifar10_15000.tar.gz, and no train and val"):
        read_images(folder)
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("frog", "cat"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    found = read_images(folder)
    assert [len(x) for x in found] == [6, 6, 4, 4]
    assert found[1].tolist() == [3] * 3 + [6] * 3  # the classes are in alphabetical order
    assert torch.equal(found[2][1], torch.from_numpy(pixels).permute(2, 0, 1))
    with tarfile.open(tmp_path / "cifar10_15000.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar10")
    assert all(map(torch.equal, read_images(tmp_path), found))
    Image.new("RGB", (33, 32)).save(folder / "val" / "cat" / "large.png")
    with pytest.raises(ExperimentError, match="large.png must have 32 x 32 pixels, got .33, 32"):
        read_images(folder)
    (folder / "val" / "cat" / "large.png").rename(folder / "val" / "large.png")
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    with pytest.raises(ExperimentError, match="must be in a folder of airplane, automobile"):
        read_images(folder)


def test_the_official_training_file_of_sts_b_is_cut_in_two():
    pairs = [Example((str(number),), "0") for number in range(STS_B_PAIRS)]
    train, held_out = split_sts_b(pairs)
    assert (len(train), len(held_out)) == (EXPERIMENTS["released-bert-sts-b"].examples, 1500)
    assert sorted(train + held_out, key=lambda pair: int(pair.inputs[0])) == pairs


def test_the_end_of_a_failed_command_is_shown(tmp_path):
    with pytest.raises(ExperimentError, match="No module named .*nowhere"):
        python(["-m", "nowhere"], tmp_path / "log")


@pytest.mark.parametrize("setting", ["evolving", "plain"])
def test_models_for_images_share_their_initial_weights(setting):
    experiment = EXPERIMENTS["images"]
    plain = experiment.create(experiment.settings["plain"], 3).state_dict()
    model = experiment.build(experiment.settings[setting], 3).state_dict()
    shared = [name for name in plain if ".evolution." not in name]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(plain[name], model[name]), name


def test_times_of_images_are_compared_by_turns(tmp_path, monkeypatch, capsys):
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(256) % 10
    work = tmp_path / "work"
    work.mkdir()
    (work / run.MARK).touch()
    torch.save((images, labels, images[:10], labels[:10]), work / "cifar10.pt")
    arguments = ["run.py", "images", "--data", tmp_path, "--work", work, "--out", tmp_path / "json"]
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--time", "2"])
        run.main()
        assert "images, round 2/2" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="images.json already exists"):
            run.main()
    finally:
        torch.set_num_threads(threads)
    sentence, _ = report.cost(EXPERIMENTS["images"], tmp_path / "json")
    assert "times as long as with plain attention, the median and the range of 2" in sentence
    other = dataclasses.replace(EXPERIMENTS["images"], default="both-0.1")
    with pytest.raises(ValueError, match="times of evolving, not of both-0.1"):
        report.cost(other, tmp_path / "json")
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--time", "2", "--seeds", "1"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--time cannot be combined" in capsys.readouterr().err


def test_a_fine_tuning_leaves_its_weights(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    name, work = "released-bert-rte", tmp_path / "work"
    experiment = dataclasses.replace(EXPERIMENTS[name], epochs=1)
    monkeypatch.setitem(EXPERIMENTS, name, experiment)
    bert = work / "minilm" / "bert"
    bert.mkdir(parents=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=12, intermediate_size=16, max_position_embeddings=32, **sizes)
    BertForSequenceClassification(config).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a b c d".split()))
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    rows = [
        {"input_ids": [2, 5 + i % 4, 6, 3], "attention_mask": [1] * 4, "label": i % 2}
        for i in range(32)
    ]
    torch.save([rows, rows], work / f"{name}.pt")
    (work / run.MARK).touch()
    arguments = ["run.py", name, "--data", tmp_path, "--work", work, "--out", tmp_path / "json"]
    arguments += ["--keep", tmp_path / "kept", "--seeds", 1, "--settings", "evolving"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    precision = torch.get_float32_matmul_precision()
    try:
        run.main()
    finally:
        torch.set_float32_matmul_precision(precision)
    model = experiment.build(str(bert), experiment.settings["evolving"], 1)
    start = {key: x.clone() for key, x in model.state_dict().items()}
    model.load_state_dict(torch.load(tmp_path / "kept" / f"{name}-evolving-seed1.pt"))
    assert not torch.equal(start["classifier.weight"], model.classifier.weight)
    assert len(list((tmp_path / "json").rglob("*.json"))) == 1


def test_the_picture_of_a_pair(tmp_path, monkeypatch, capsys):
    """It shows the maps of the weights that are given."""
    experiment, image = EXPERIMENTS["images"], torch.arange(3072, dtype=torch.uint8).view(3, 32, 32)
    (tmp_path / "weights").mkdir()
    for setting in picture.SETTINGS:
        model = experiment.build(experiment.settings[setting], seed=7)
        torch.save(model.state_dict(), run.kept(tmp_path / "weights", (experiment, setting, 7)))
    images = image.expand(2, -1, -1, -1)
    torch.save((images, torch.zeros(2), images, torch.tensor([3, 4])), tmp_path / "cifar10.pt")
    out = tmp_path / "maps.png"
    arguments = ["--weights", tmp_path / "weights", "--work", tmp_path, "--seed", 7, "--out", out]
    monkeypatch.setattr(sys, "argv", ["picture.py", *map(str, arguments), "--image", "1"])
    picture.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "the image shows: deer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="maps.png already exists"):
        picture.main()

    look = picture.look_of(tmp_path / "weights", "evolving", 7, image)
    model = experiment.build(experiment.settings["evolving"], seed=7).eval()
    with torch.no_grad(), collect_maps(model) as maps:
        model(
            (image / 255 - torch.tensor(MEAN).view(3, 1, 1))[None] / torch.tensor(STD).view(3, 1, 1)
        )
    torch.testing.assert_close(look.maps[5].attn_probs, maps[5].attn_probs)
    expected = maps[5].attn_probs[0, 1, 0, 1:].view(8, 8)  # of the class token
    torch.testing.assert_close(look.heat_of(look.maps[5], 1), expected)
    figure = picture.draw({"evolving": look, "plain": look})
    assert len([axes for axes in figure.findobj(Axes) if axes.images]) == 2 * 2 * 6


def test_augmentation_moves_and_flips_images():
    from with_timm import augment, normalise

    images = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(1, 3, 32, 32).expand(64, -1, -1, -1)
    padded = torch.nn.functional.pad(normalise(images[:1]), (4, 4, 4, 4))[0]
    windows = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    windows = torch.stack(windows + [x.flip(2) for x in windows])
    found = set()
    for image in augment(images, torch.Generator().manual_seed(0)):
        (match,) = (windows == image).flatten(1).all(dim=1).nonzero()
        found.add(int(match))
    assert len(found) > 40
    assert min(found) < 81 <= max(found)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("window", WINDOWS)
def test_convolutions_that_copy_their_input(window, kernel_size):
    layer = AttentionEvolution(4, 0.25, 0.5, kernel_size, window).double()
    logits, prev = torch.randn(2, 2, 4, 6, 7, dtype=torch.float64)
    a_in = 0.25 * prev + 0.75 * logits
    set_start(layer, {"start": "identity"})
    expected = a_in.where(a_in > 0, 0.5 * a_in)
    torch.testing.assert_close(layer(logits, prev), expected, rtol=0, atol=1e-12)
    set_start(layer, {"start": "shifted"})
    torch.testing.assert_close(layer(logits, prev), a_in + 0.5 * 8.0, rtol=0, atol=1e-12)


SIDES = ("plain", "identity")


@pytest.mark.slow
def test_a_run_from_data_to_json(tmp_path, monkeypatch, capsys):
    """Both settings start from the same weights; a second run has nothing left to do."""
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        lines = [f"a {size} {thing} ." for size in ("small", "big") for thing in ("dog", "man")]
        (folder / f"{split}.en").write_text("\n".join(lines * 40) + "\n")
    experiment = EXPERIMENTS["masked-lm-captions"]
    recipe = experiment.recipe.replace("--lr 2e-3", "--lr 1e-30")
    settings = {name: EXPERIMENTS["translation-ablations"].settings[name] for name in SIDES}
    small = dataclasses.replace(experiment, recipe=recipe, updates=1, every=1, settings=settings)
    monkeypatch.setitem(EXPERIMENTS, experiment.name, small)
    weights = {}

    def keep(self, seed, work, run):
        weights[run] = torch.load(run / "checkpoint_last.pt")["model"]
        return {}

    monkeypatch.setattr(type(small), "evaluate", keep)
    arguments = [
        *("run.py", experiment.name, "--data", tmp_path / "data", "--work", tmp_path / "work"),
        *("--out", tmp_path / "json", "--settings", *SIDES, "--seeds", 2),
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    run.main()
    assert "2 jobs, 0 of them done before" in capsys.readouterr().out
    plain, identity = weights.values()
    assert len(identity) == len(plain) + 3 * 4
    for name, weight in plain.items():
        assert torch.equal(identity[name], weight), name
    kernels = [x for name, x in identity.items() if name.endswith("evolution.weight")]
    assert len(kernels) == 3 and all(x.sum() == x[:, :, 1, 1].trace() == 4 for x in kernels)
    for setting in SIDES:
        path = tmp_path / "json" / experiment.name / f"{setting}-seed2.json"
        result = json.loads(path.read_text())
        assert result["scores"]["validation loss, bits"] == result["curve"][-1][1] > 0
        assert result["seconds"] > 0 and result["cpu_seconds"] > 0
    run.main()
    assert "2 jobs, 2 of them done before" in capsys.readouterr().out
    assert len(weights) == 2
