from ea_fairseq.tasks import time_series  # noqa: F401
