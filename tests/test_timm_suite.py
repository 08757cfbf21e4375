"""timm's own test suite, unchanged, from the source release of the installed timm."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

pytestmark = [pytest.mark.slow, pytest.mark.network]

MODELS = [
    "ea_vit_tiny_patch16_224",
    "ea_deit_tiny_distilled_patch16_224",
    "ea_resnet34",
    "ea_resnet50",
]
# The numbers of the suite's tests for timm's own models of these kinds.
EXPECTED = {
    "test_model_backward",
    "test_model_backward_fx",
    "test_model_forward",
    "test_model_forward_fx",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_torchscript",
    "test_prune_intermediate_layers_contract",
}


@pytest.fixture(scope="session")
def suite(request):
    """The folder of the suite, downloaded once for each version of timm."""
    folder = request.config.cache.mkdir(f"timm-{timm.__version__}")
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "timm", f"timm=={timm.__version__}", "--dest", str(folder)]
        subprocess.run(command, check=True)
        (archive,) = folder.glob("timm-*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source.getmembers():
                name = member.name.partition("/")[2]
                if member.isfile() and (name.startswith("tests/") or name == "pyproject.toml"):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(source.extractfile(member).read())
        (folder / "complete").touch()
    return folder


def test_timms_own_tests(suite):
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    names = " or ".join(f"1-{name}] or 2-{name}] or [{name}]" for name in MODELS)
    command = [sys.executable, "-m", "pytest", "-p", "timm_plugin", "-p", "no:cacheprovider"]
    command += ["-v", "-k", names, "tests/test_models.py"]
    run = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = re.findall(
        r"^tests/test_models.py::(\w+)\[.*?(ea_\w+)\] ([A-Z]+)", run.stdout, re.MULTILINE
    )
    assert {result for _, _, result in results} == {"PASSED"}, run.stdout
    for name in MODELS:
        cfgs = "test_model_default_cfgs" if "resnet" in name else "test_model_default_cfgs_non_std"
        assert {test for test, model, _ in results if model == name} >= EXPECTED | {cfgs}
