from ea_fairseq.models import (  # noqa: F401
    ea_dc_transformer,
    ea_multilingual_transformer,
    ea_roberta,
    ea_transformer,
    ea_transformer_align,
)
