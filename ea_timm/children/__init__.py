"""A folder on the PYTHONPATH of the processes that a script starts, see :mod:`ea_timm.run`."""
