from ea_fairseq.models import ea_transformer  # noqa: F401
