"""Commands of a timm user: scripts with ``ea_*`` registered, and the digits example."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image
from test_prepare import snapshot

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, timm
print(sys.argv, __name__, sys.path[0])
print(timm.list_models(sys.argv[1]))
"""


def python(*args, cwd, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, **options
    )


def test_a_script_runs_as_it_does_by_itself_with_the_models_registered(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "list.py").write_text(SCRIPT)
    run = python("-m", "ea_timm.run", "scripts/list.py", "ea_resnet*", "--flag", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    arguments, models = run.stdout.splitlines()
    assert arguments == f"['scripts/list.py', 'ea_resnet*', '--flag'] __main__ {folder}"
    assert models == "['ea_resnet34', 'ea_resnet50', 'ea_resnet101', 'ea_resnet152']"


LAUNCHER = """
import multiprocessing, subprocess, sys, timm

def models():
    print(timm.list_models("ea_resnet*"))

if __name__ == "__main__":
    for child in sys.argv[1:]:  # as timm's bulk_runner.py starts its scripts
        print(subprocess.check_output((sys.executable, "-u", child)).decode(), end="", flush=True)
    process = multiprocessing.get_context("spawn").Process(target=models)
    process.start()
    process.join()
"""


def test_the_processes_that_a_script_starts_know_the_models(tmp_path):
    """Also from a directory where ``ea_timm`` cannot be imported; and nothing else changes."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys; sys.theirs = True")
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "child.py").write_text(
        "import sys; print('timm' in sys.modules, sys.theirs); import timm.models\n"
        "print(timm.list_models('ea_resnet*'))"
    )
    (tmp_path / "plain.py").write_text("import sys; print('ea_timm' in sys.modules)")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = "import sys; sys.path.insert(0, sys.argv.pop(1)); import ea_timm.run as r; r.main()"
    command = [sys.executable, "-c", command, ROOT, "launcher.py", "child.py", "plain.py"]
    run = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    models = "['ea_resnet34', 'ea_resnet50', 'ea_resnet101', 'ea_resnet152']"
    assert run.stdout.splitlines() == ["False True", models, "False", models]


def test_bad_use_of_the_door_says_what_is_right(tmp_path):
    run = python("-m", "ea_timm.run", cwd=tmp_path)
    assert run.returncode != 0 and "usage: python -m ea_timm.run SCRIPT.py" in run.stderr
    run = python("-m", "ea_timm.run", "validate.py", cwd=tmp_path)
    assert run.returncode != 0
    assert "validate.py is no file" in run.stderr and "Traceback" not in run.stderr


def test_digits(tmp_path, monkeypatch, capsys):
    """The example learns better than chance, and timm can load what it saves."""
    monkeypatch.chdir(tmp_path)
    digits("--epochs", 2, "--model-kwargs", "depth=3", "alpha=0.3")
    printed = capsys.readouterr().out
    assert "1450 images to train with, 347 to validate with" in printed
    accuracies = re.findall(r"epoch \d: training loss \d\.\d+, accuracy (\d+\.\d) %", printed)
    assert len(accuracies) == 2 and float(accuracies[1]) > 20

    sizes = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 10, "alpha": 0.3}
    timm.create_model("ea_vit_tiny", checkpoint_path="digits/ea_vit_tiny.pth", **sizes)
    before = snapshot(tmp_path)
    for options, message in (
        (["--model", "ea_vit_tinny"], "--model ea_vit_tinny is unknown"),
        (["--batch-size", 5000, "--overwrite"], "--batch-size must be 1450 or less"),
        (["--epochs", 0], "--epochs: must be a whole number of at least 1, got 0"),
        (["--model-kwargs", "alpha=3", "--overwrite"], "--model-kwargs: alpha must lie in"),
        (["--model-kwargs", "patch_size=0", "--overwrite"], "--model-kwargs: "),
        (["--model-kwargs", "global_pool=foo", "--overwrite"], "--model-kwargs: "),
        (["--model-kwargs", "in_chans=1", "--overwrite"], "--model-kwargs: "),
        ([], "digits/ea_vit_tiny.pth already exists; choose another name, or add --overwrite"),
    ):
        assert message in error_of_digits(capsys, *options)
    assert snapshot(tmp_path) == before


def digits(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["digits.py", *map(str, options)])
        runpy.run_path(str(ROOT / "examples/imagenet/digits.py"), run_name="__main__")


def error_of_digits(capsys, *options):
    with pytest.raises(SystemExit) as stopped:
        digits(*options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["train/0/photo.png", "train/0/0005.png", "validation/cat/1.JPEG", "train", "ea_vit_tiny.pth"],
)
def test_digits_spares_the_users_images(tmp_path, monkeypatch, capsys, name):
    """It refuses to train on other images."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "digits" / name
    path.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(path, format="PNG")
    (tmp_path / "digits" / "thesis.txt").write_text("theirs")
    before = snapshot(tmp_path)
    assert f"digits/{name}" in error_of_digits(capsys)
    assert snapshot(tmp_path) == before
