"""Shared by the ``ea_*`` models: their options, and how they load weights."""

from typing import Any, Dict, List, Optional

from timm.models._input import update_model_args
from torch import Tensor

from ea_timm.attention2d import RelativeLogits2d
from evolving_attention import AttentionEvolution
from evolving_attention.checks import check_flag, check_options
from evolving_attention.loading import StartsFromPlainWeights, adopt_options

# The official code's, for its ResNet.
DEFAULTS = {"alpha": 0.5, "beta": 1.0, "kernel_size": 3}


def complete_options(
    alpha: Optional[float], beta: Optional[float], kernel_size: Optional[int], learnable: bool
) -> Dict[str, Any]:
    """The options of :class:`AttentionEvolution`, with defaults for those that are None.

    Raises:
        ValueError: an option is out of range or has a wrong type; the message names it.
    """
    given = {"alpha": alpha, "beta": beta, "kernel_size": kernel_size}
    options = {name: DEFAULTS[name] if x is None else x for name, x in given.items()}
    check_options(**options)
    check_flag("learnable", learnable)
    return {**options, "learnable": learnable}


def check_class(name: str, given: Any, *bases: type) -> None:
    """Raises ValueError, naming the argument, unless `given` is one of `bases` or a subclass."""
    if not (isinstance(given, type) and issubclass(given, bases)):
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(
            f"{name} must be ea_timm's {names} or a subclass of it, since it hands its attention "
            f"map on, got {given!r}"
        )


class EvolvingModel(StartsFromPlainWeights):
    """A model that takes the options that were not given from the weights that it loads.

    It comes after timm's class in the list of bases. The constructor calls :meth:`remember`.
    """

    def remember(
        self, alpha: Optional[float], beta: Optional[float], kernel_size: Optional[int]
    ) -> None:
        """Records the given options; those that are None will follow the weights."""
        given = {"alpha": alpha, "beta": beta, "kernel_size": kernel_size}
        self.adopted = [name for name, x in given.items() if x is None]
        self.record_options()

    def record_options(self) -> None:
        """Records the options in the configuration that timm saves with the model.

        Numbers that differ between layers were learned; only the weights have them.
        """
        evolutions = self.evolutions()
        if not evolutions:
            return
        first = evolutions[0]
        one_for_all = all(
            evolution.mixing == first.mixing
            and (evolution.learnable or (evolution.weight is None) == (evolution.mixing[1] == 0))
            for evolution in evolutions
        )
        options: Dict[str, Any] = {
            "kernel_size": first.kernel_size,
            "learnable": first.learnable or not one_for_all,
        }
        if one_for_all:
            options.update(alpha=first.mixing[0], beta=first.mixing[1])
        update_model_args(self, **options)

    def evolutions(self) -> List[AttentionEvolution]:
        """The model's evolutions, in order."""
        return [module for module in self.modules() if isinstance(module, AttentionEvolution)]

    def init_non_persistent_buffers(self) -> None:
        """Completes a model that transformers has loaded; transformers calls this hook last.

        transformers sets weights one by one, without the modules' loading methods, and leaves those
        that are in no file uninitialised in modules that it does not know. Loaded parameters carry
        the mark below; a model without marks was not loaded by transformers and stays as it is.
        """
        mark = "_is_hf_initialized"
        if not any(hasattr(parameter, mark) for parameter in self.parameters()):
            return
        for module in self.modules():
            if isinstance(module, (AttentionEvolution, RelativeLogits2d)):
                if not all(hasattr(parameter, mark) for parameter in module.parameters()):
                    module.reset_parameters()  # inside transformers, this spares marked parameters
                for parameter in module.parameters():
                    setattr(parameter, mark, True)
            if isinstance(module, AttentionEvolution) and not hasattr(module.alpha, mark):
                module.reset_mixing()
        self.load_state_dict(self.state_dict())  # adopts or refuses the numbers

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        adopt_options(self, self.adopted, state_dict, prefix)
        self.record_options()
        super()._load_from_state_dict(state_dict, prefix, *args)
