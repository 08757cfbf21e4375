"""Runs one of timm's scripts with the ``ea_*`` models registered.

    python -m ea_timm.run validate.py DATA --model ea_deit_small --checkpoint model_best.pth.tar

For validate.py, benchmark.py, inference.py and onnx_export.py, which import no other modules;
train.py has ``--device-modules ea_timm`` of its own. On many GPUs: ``torchrun ... -m ea_timm.run``.
"""

import runpy
import sys
from pathlib import Path

import ea_timm  # noqa: F401 (registers the models)


def main() -> None:
    """Runs the script that the first argument names, with the others as its own."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m ea_timm.run SCRIPT.py [the script's own arguments]")
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(
            f"{script} is no file: the first argument must be the path of one of timm's scripts "
            "(validate.py, benchmark.py, inference.py, onnx_export.py); they are in timm's source, "
            "https://github.com/huggingface/pytorch-image-models, not in its wheel"
        )
    del sys.argv[0]
    sys.path[0] = str(script.parent.resolve())  # as python SCRIPT.py sets it
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
