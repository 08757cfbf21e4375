from ea_fairseq.models import ea_dc_transformer, ea_roberta, ea_transformer  # noqa: F401
