"""Runs one of timm's scripts with the ``ea_*`` models registered.

    python -m ea_timm.run validate.py DATA --model ea_deit_small --checkpoint model_best.pth.tar

Use it for validate.py, benchmark.py, inference.py and onnx_export.py, which cannot import other
modules, and for bulk_runner.py, which starts them; train.py has the option ``--device-modules
ea_timm``. On several GPUs: ``torchrun ... -m ea_timm.run``.
"""

import os
import runpy
import sys
from pathlib import Path

import ea_timm  # registers the models
import ea_timm.children


def main() -> None:
    """Runs the script that the first argument names, with the other arguments."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m ea_timm.run SCRIPT.py [the script's own arguments]")
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(
            f"{script} is no file: the first argument must be the path of one of timm's scripts "
            "(validate.py, benchmark.py, inference.py, onnx_export.py, bulk_runner.py). They are "
            "in timm's source, https://github.com/huggingface/pytorch-image-models, not in its "
            "wheel"
        )
    del sys.argv[0]
    sys.path[0] = str(script.parent.resolve())  # as python SCRIPT.py sets it
    # The processes that the script starts find the module that registers the models there, too,
    # and, after everything else, this package.
    registering, package = (Path(x.__path__[0]) for x in (ea_timm.children, ea_timm))
    paths = [str(registering), os.environ.get("PYTHONPATH", ""), str(package.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path.append(str(package.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
