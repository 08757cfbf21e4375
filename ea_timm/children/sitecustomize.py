"""Registers the ``ea_*`` models in a Python process as soon as it has imported timm.

Python imports a module of this name whenever it starts.
"""

import sys
from contextlib import suppress
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from pathlib import Path


class RegistersAfterTimm(MetaPathFinder):
    """Finds timm as others do, and has ``ea_timm`` imported after it."""

    def find_spec(self, name, path, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec("timm")
        if spec is not None:
            run_timm = spec.loader.exec_module

            def run_both(module):
                run_timm(module)
                import_module("ea_timm")

            spec.loader.exec_module = run_both
        return spec


sys.meta_path.insert(0, RegistersAfterTimm())

# Another module of this name, which this one hides, runs too.
folder = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry) != folder]
this = sys.modules.pop(__name__)
with suppress(ModuleNotFoundError):
    import_module(__name__)
sys.modules.setdefault(__name__, this)
