"""Evolving attention in fairseq: ``fairseq-train DATA --user-dir ea_fairseq --arch ea_...``.

Importing the package registers its models and lets torch >= 2.6, which refuses to unpickle what
it does not know, load fairseq's checkpoints: the few harmless types they hold are named below,
everything else stays refused.
"""

import argparse
import os

import fairseq
import numpy as np
import torch

# Where fairseq finds `--user-dir ea_fairseq` from any directory: beside itself. It takes a package
# that is imported already for another one unless the path is spelled its own way.
_beside_fairseq = os.path.join(os.path.dirname(fairseq.__file__), "..", "ea_fairseq")
if os.path.exists(_beside_fairseq) and os.path.samefile(_beside_fairseq, __path__[0]):
    __path__.append(_beside_fairseq)

# numpy 2 moved the module that numpy 1 checkpoints name.
_multiarray = getattr(np, "_core", None) or np.core

torch.serialization.add_safe_globals(
    [
        argparse.Namespace,  # the model's and the task's options
        np.ndarray,  # the n-gram counts that --eval-bleu logs
        np.dtype,
        type(np.dtype("int64")),
        type(np.dtype("float64")),
        np.float64,  # the validation score, where a metric is a numpy number
        (_multiarray.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        (_multiarray.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
        (_multiarray.multiarray.scalar, "numpy.core.multiarray.scalar"),
        (_multiarray.multiarray.scalar, "numpy._core.multiarray.scalar"),
    ]
)

from ea_fairseq import models  # noqa: E402, F401
from ea_fairseq.command_line import show_model_options_in_help  # noqa: E402

show_model_options_in_help()
