"""A pytest plugin that lets timm's own test suite, unchanged, test the ``ea_*`` models too.

The suite chooses what to test by patterns of names; whatever it says about ``vit_*`` also holds
for ``ea_vit_*``: ``pytest -p timm_plugin -k ea_ tests/test_models.py`` in timm's source.
"""

from typing import Any, List, Sequence, Union

import timm

import ea_timm  # noqa: F401 (registers the models)

list_plain_models = timm.list_models


def widen(patterns: Union[str, Sequence[str]]) -> Union[str, List[str]]:
    """The patterns, and each of them with ``ea_`` before it."""
    if not patterns:
        return ""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return patterns + [f"ea_{pattern}" for pattern in patterns]


def list_models(
    filter: Any = "", *args: Any, exclude_filters: Any = "", **kwargs: Any
) -> List[str]:
    """timm's list_models, in which ``vit_*`` includes ``ea_vit_*``."""
    return list_plain_models(widen(filter), *args, exclude_filters=widen(exclude_filters), **kwargs)


timm.list_models = list_models
