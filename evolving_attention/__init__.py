"""Evolving Attention (Wang et al., ICML 2021; TPAMI 2023) for PyTorch.

:class:`AttentionEvolution` is all that a model needs for one attention layer. The paper's two
equations are in :mod:`evolving_attention.functional` (fast) and, written literally, in
:mod:`evolving_attention.reference`. :func:`collect_maps` shows the maps of any model.
"""

from evolving_attention.checks import WINDOWS
from evolving_attention.functional import evolve
from evolving_attention.maps import AttentionMap, AttentionProbe, collect_maps
from evolving_attention.modules import AttentionEvolution

__version__ = "0.2.0.dev0"

__all__ = [
    "WINDOWS",
    "AttentionEvolution",
    "AttentionMap",
    "AttentionProbe",
    "__version__",
    "collect_maps",
    "evolve",
]
