from ea_fairseq.criterions import time_series  # noqa: F401
