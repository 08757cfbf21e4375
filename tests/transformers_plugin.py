"""A pytest plugin that lets transformers' own model tests, unchanged, test the ``EA*`` models.

In a copy of transformers' source, with this folder on the path::

    pytest -p transformers_plugin tests/models/bert/test_modeling_bert.py

Whatever these tests say about ``BertModel`` is then said about ``EABertModel``, and so on; classes
that have no evolving counterpart, decoders of BERT and RoBERTa, are left out.
"""

from typing import List

import pytest
import transformers
from transformers.models.auto import modeling_auto

import ea_transformers

for name in ea_transformers.__all__:
    if name.startswith("EA"):
        setattr(transformers, name.removeprefix("EA"), getattr(ea_transformers, name))

# The tests tell the task of a class by its name.
for mapping in [x for name, x in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]:
    for host in ("bert", "roberta", "t5"):
        found = f"EA{mapping.get(host)}"
        if found in ea_transformers.__all__:
            mapping[f"ea_{host}"] = found


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for test in {item.cls for item in items if hasattr(item.cls, "all_model_classes")}:
        test.all_model_classes = tuple(
            x for x in test.all_model_classes if x.__name__ in ea_transformers.__all__
        )
