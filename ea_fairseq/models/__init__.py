from ea_fairseq.models import ea_roberta, ea_transformer  # noqa: F401
