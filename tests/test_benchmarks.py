"""The benchmarks: their sides compute the same, their measurements are right, and each one runs."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import timm
import torch

import ea_timm  # noqa: F401 (registers the models)
from evolving_attention import WINDOWS, AttentionEvolution, reference

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import common
import growth
import resnet
import roberta
import time_series
import translation
import vit
from literal import LiteralEvolution, make_literal

PLAIN_AND_OURS = ["fairseq", "ours"]
TRANSLATION = (
    "--arch transformer_tiny --vocabulary 60 --sentences 4 --length 6 --generation-sentences 2"
)


@pytest.mark.parametrize(
    ("script", "options", "settings"),
    [
        (
            vit,
            "--models deit_tiny --batch-size 1 --image-size 32",
            {
                "deit_tiny, training": ["timm", "timm, not fused", "ours", "literal"],
                "deit_tiny, inference": ["timm", "timm, not fused", "ours", "literal"],
            },
        ),
        (
            resnet,
            "--batch-size 2 --image-size 32 --mode training",
            {"resnet50, training": ["timm", "ours, alpha = beta = 0", "ours", "literal"]},
        ),
        (
            translation,
            f"{TRANSLATION} --lengths 5 --dtype bfloat16",
            {
                "transformer_tiny, training, 4 sentences of 5 to 6 tokens": [
                    *PLAIN_AND_OURS,
                    "literal",
                ],
                "transformer_tiny, beam 5, 2 sentences of 5 tokens": PLAIN_AND_OURS,
            },
        ),
        (
            roberta,
            "--layers 2 --vocabulary 60 --sentences 2 --length 8",
            {"roberta_base, training, 2 sentences of 8 tokens": [*PLAIN_AND_OURS, "literal"]},
        ),
        (
            time_series,
            "--lengths 9 --batch-size 3",
            {
                "9 steps, 3 series at once": [
                    "convolutions",
                    "plain",
                    "ours",
                    "ours, checkpointing",
                ]
            },
        ),
        (
            growth,
            "--lengths 8 --heads 1 2 --length 8 --num-heads 2 --layers 2 --plot growth.png",
            {
                f"length 8, {heads} heads": ["softmax", "fused", "ours", "literal"]
                for heads in (2, 1)
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.slow
def test_each_runs_and_reports_every_side(script, options, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script.main(
        f"{options} --device cpu --rounds 1 --threads 1 --json x.json --markdown x.md".split()
    )
    written = json.loads(Path("x.json").read_text())
    assert "torch" in written["machine"]
    measured = {table["setting"]: table["sides"] for table in written["settings"]}
    assert {setting: list(sides) for setting, sides in measured.items()} == settings
    for sides in measured.values():
        assert all(side["seconds"] and side["peak_bytes"] > 0 for side in sides.values())
    table = Path("x.md").read_text()
    assert table == capsys.readouterr().out
    for setting, sides in settings.items():
        assert all(f"| {setting} | {side} |" in table for side in sides)
    assert ("--plot" in options) == Path("growth.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 0", "--rounds: must be a whole number of at least 1, got 0"),
        ("--rounds x", "--rounds: must be a whole number of at least 1, got x"),
        ("--json .", "--json: . is a folder; give the name of a file"),
        ("--json nowhere/x.json", "--json: there is no folder nowhere to write x.json to"),
        ("--plot growth.txt", "--plot growth.txt: the name must end in one of .eps"),
    ],
)
def test_bad_options_are_found_before_anything_runs(options, message, capsys):
    with pytest.raises(SystemExit):
        growth.main(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["json", "markdown", "plot"])
def test_no_file_is_overwritten_unasked(tmp_path, capsys, name):
    path = tmp_path / "theirs.png"
    path.write_text("theirs")
    with pytest.raises(SystemExit):
        growth.main([f"--{name}", str(path)])
    assert f"--{name}: {path} already exists; choose another" in capsys.readouterr().err
    assert path.read_text() == "theirs"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("window", "kernel_size"), product(WINDOWS, (1, 3, 5)))
def test_the_literal_evolution_is_the_papers(window, kernel_size, masked):
    torch.manual_seed(0)
    options = dict(kernel_size=kernel_size, window=window, dtype=torch.float64)
    evolution = LiteralEvolution(3, 0.3, 0.6, **options)
    maps = torch.randn(2, 2, 3, 7, 5, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 5) < 0.3 if masked else None
    weights = (evolution.weight, evolution.bias, 0.3, 0.6)
    expected = reference.evolve(*maps, *weights, window=window, mask=mask)
    torch.testing.assert_close(evolution(*maps, mask), expected)


@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"beta": 0.0}])
def test_a_literal_model_gives_what_ours_gives(options):
    sizes = dict(img_size=32, depth=3, embed_dim=12, num_classes=5)
    ours = timm.create_model("ea_vit_tiny", **sizes, **options).double().eval()
    literal = make_literal(ours)
    evolutions = [m for m in literal.modules() if isinstance(m, AttentionEvolution)]
    assert [type(evolution) for evolution in evolutions] == [LiteralEvolution] * 2
    assert not any(isinstance(m, LiteralEvolution) for m in ours.modules())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(literal(images), ours(images))


def test_the_memory_of_a_step_is_exact():
    before = torch.ones(1000)

    def step():
        first = before + 1  # 4000 bytes
        second = torch.cat([first, first])  # 8000 more
        del first
        second.sum()  # 4 bytes, after the first 4000 have been freed

    assert common.peak_memory(step, "cpu") == 12_000
    assert common.peak_memory(lambda: None, "cpu") == 0


def test_the_sides_take_turns_and_every_round_starts_with_another():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    results = common.measure(sides, rounds=2, device="cpu")
    assert "".join(calls) == "aabbcc" + "abc" + "bca"
    assert {name: len(result["seconds"]) for name, result in results.items()} == dict(a=2, b=2, c=2)
