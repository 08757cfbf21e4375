"""Evolving attention in fairseq: ``fairseq-train DATA --user-dir ea_fairseq --arch ea_...``.

Importing the package registers its models and makes fairseq's checkpoints loadable.
"""

import os

import fairseq

from ea_fairseq import criterions, models, tasks  # noqa: F401
from ea_fairseq.checkpoints import allow_checkpoints
from ea_fairseq.command_line import show_model_options_in_help

# Where fairseq finds `--user-dir ea_fairseq` from any directory: beside itself. It takes a package
# that is imported already for another one unless the path is spelled its own way.
_beside_fairseq = os.path.join(os.path.dirname(fairseq.__file__), "..", "ea_fairseq")
if os.path.exists(_beside_fairseq) and os.path.samefile(_beside_fairseq, __path__[0]):
    __path__.append(_beside_fairseq)

allow_checkpoints()
show_model_options_in_help()
