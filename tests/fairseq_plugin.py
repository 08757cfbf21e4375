"""A pytest plugin that lets fairseq's own tests, unchanged, test the ``ea_*`` models.

In a copy of fairseq's source, with this folder on the path::

    pytest -p fairseq_plugin tests/test_transformer.py tests/test_export.py ...

Whatever these tests say about ``TransformerModel`` or ``--arch transformer_iwslt_de_en`` is then
said about ``EATransformerModel`` and ``--arch ea_transformer_iwslt_de_en``, and so on.
"""

from fairseq import models
from fairseq.models import roberta, transformer

import ea_fairseq  # noqa: F401 (registers the models)

for registry in (models.ARCH_MODEL_REGISTRY, models.ARCH_CONFIG_REGISTRY):
    for name in [name for name in registry if f"ea_{name}" in registry]:
        registry[name] = registry[f"ea_{name}"]

transformer.TransformerModel = models.MODEL_REGISTRY["ea_transformer"]
roberta.RobertaModel = models.MODEL_REGISTRY["ea_roberta"]
transformer.tiny_architecture = models.ARCH_CONFIG_REGISTRY["transformer_tiny"]
