"""A pytest plugin that lets transformers' own model tests, unchanged, test the ``EA*`` models.

In a copy of transformers' source, with this folder on the path::

    pytest -p transformers_plugin tests/models/bert/test_modeling_bert.py

Whatever these tests say about ``BertModel`` is then said about ``EABertModel``, and so on; classes
that have no evolving counterpart, decoders of BERT and RoBERTa, are left out.
"""

from typing import Any, List

import pytest
from transformers.models.auto import modeling_auto

import ea_transformers

OURS = {
    name.removeprefix("EA"): getattr(ea_transformers, name)
    for name in ea_transformers.__all__
    if name.startswith("EA")
}

# The tests tell the task of a class by its name, and look for it among the values of these.
for name, mapping in list(vars(modeling_auto).items()):
    if not name.startswith("MODEL_") or not name.endswith("_MAPPING_NAMES"):
        continue
    for host in ("bert", "roberta", "t5"):
        if mapping.get(host) in OURS:
            mapping[f"{host} of this plugin"] = f"EA{mapping[host]}"


def ours(plain: Any) -> List[Any]:
    """Our class in the place of a plain one, if there is one."""
    return [OURS[plain.__name__]] if plain.__name__ in OURS else []


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for module in {item.module for item in items}:
        for name in OURS.keys() & vars(module).keys():
            setattr(module, name, OURS[name])
    for test in {item.cls for item in items if hasattr(item.cls, "all_model_classes")}:
        test.all_model_classes = tuple(y for x in test.all_model_classes for y in ours(x))
