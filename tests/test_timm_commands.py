"""What a timm user types: scripts with ``ea_*`` registered, and the digits example."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, timm
print(sys.argv, __name__, sys.path[0])
print(timm.list_models(sys.argv[1]))
"""


def python(*args, cwd, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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
    assert models == "['ea_resnet50', 'ea_resnet101', 'ea_resnet152']"


def test_bad_use_of_the_door_says_what_is_right(tmp_path):
    run = python("-m", "ea_timm.run", cwd=tmp_path)
    assert run.returncode != 0 and "usage: python -m ea_timm.run SCRIPT.py" in run.stderr
    run = python("-m", "ea_timm.run", "validate.py", cwd=tmp_path)
    assert run.returncode != 0
    assert "validate.py is no file" in run.stderr and "Traceback" not in run.stderr


def test_digits(tmp_path):
    """The example trains, and better than by guessing; what it saves is timm's to read."""
    script = ROOT / "examples/imagenet/digits.py"
    options = ["--epochs", 2, "--model-kwargs", "depth=3", "alpha=0.3"]
    run = python(script, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "1450 images to train with, 347 to validate with" in run.stdout
    accuracies = re.findall(r"epoch \d: training loss \d\.\d+, accuracy (\d+\.\d) %", run.stdout)
    assert len(accuracies) == 2 and float(accuracies[1]) > 20

    load = (
        "import timm, ea_timm;"
        "timm.create_model('ea_vit_tiny', img_size=32, patch_size=8, depth=3, num_classes=10,"
        " alpha=0.3, checkpoint_path='digits/ea_vit_tiny.pth')"
    )
    run = python("-c", load, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = python(script, "--model", "ea_vit_tinny", cwd=tmp_path)
    assert run.returncode != 0 and "--model ea_vit_tinny is unknown" in run.stderr
    for options, message in (
        (["--batch-size", 5000], "--batch-size must be 1450 or less"),
        (["--epochs", 0], "--epochs: must be 1 or more, got 0"),
        (["--model-kwargs", "alpha=3"], "--model-kwargs: alpha must lie in"),
    ):
        run = python(script, *options, cwd=tmp_path)
        assert run.returncode == 2 and message in run.stderr
