"""Evolving attention in fairseq: ``fairseq-train DATA --user-dir ea_fairseq --arch ea_...``.

Importing the package registers its models and makes fairseq's checkpoints loadable.
"""

import importlib
import os
import sys

import fairseq

NAME = "ea_fairseq"

if __name__ == NAME:
    from ea_fairseq import criterions, models, tasks  # noqa: F401
    from ea_fairseq.checkpoints import allow_checkpoints, prune_only_once
    from ea_fairseq.command_line import show_model_options_in_help

    # From any directory, fairseq looks for `--user-dir ea_fairseq` beside itself. It takes an
    # imported package for another one unless `__path__` has the path as fairseq spells it.
    _beside_fairseq = os.path.join(os.path.dirname(fairseq.__file__), "..", NAME)
    if os.path.exists(_beside_fairseq) and os.path.samefile(_beside_fairseq, __path__[0]):
        __path__.append(_beside_fairseq)

    allow_checkpoints()
    prune_only_once()
    show_model_options_in_help()
else:
    # `--user-dir` names the folder by a link. fairseq would import every module again under the
    # link's name, and register every model twice, so that name stands for the modules below.
    try:
        _package = importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        raise ImportError(f"--user-dir {__path__[0]}: install evolving-attention first") from error
    if not any(os.path.samefile(__path__[0], path) for path in _package.__path__):
        raise ImportError(
            f"--user-dir {__path__[0]} is another copy of {NAME} than the installed one; use "
            f"--user-dir {_package.__path__[0]}"
        )
    for _name, _module in list(sys.modules.items()):
        if _name.startswith(f"{NAME}."):
            sys.modules[_name.replace(NAME, __name__, 1)] = _module
