"""Loading the weights of a model that does not evolve into one that does."""

import logging
from typing import Any, ClassVar, Collection, Dict, Mapping, Tuple

from torch import Tensor, nn

from evolving_attention.modules import AttentionEvolution

logger = logging.getLogger(__name__)


class StartsFromPlainWeights(nn.Module):
    """A model that loads the weights of the plain model, and then says what they left fresh.

    To stand behind the host's class among the bases. With ``strict``, a checkpoint that has
    nothing of a fresh part leaves it at its initial values, with one warning; one that has only
    some of it is refused. Without, PyTorch names what is missing in `missing_keys`.

    Attributes:
        fresh_parts: names of the submodules that a plain model does not have.
    """

    fresh_parts: ClassVar[Tuple[str, ...]] = ("evolution",)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in PyTorch, but for the fresh parts."""
        if strict:
            state_dict = self.with_fresh_parts(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def with_fresh_parts(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state dict, completed by the initial values of the parts that it knows nothing of."""
        fresh: Dict[str, Tensor] = {}
        for part in self.fresh_parts:
            known = any(f".{part}." in f".{name}" for name in state_dict)
            for name, parameter in self.named_parameters(remove_duplicate=False):
                if not known and f".{part}." in f".{name}" and not parameter.is_meta:
                    fresh[name] = parameter.detach()
        if not fresh:
            return state_dict
        logger.warning(
            "%d weights of %s are not in the checkpoint and keep their initial values: %s, ...",
            len(fresh),
            type(self).__name__,
            next(iter(fresh)),
        )
        return {**state_dict, **fresh}


def adopt_options(
    model: nn.Module, options: Collection[str], state_dict: Dict[str, Tensor], prefix: str
) -> None:
    """Gives each evolution in `model` the options that the checkpoint was trained with.

    Args:
        model: in whose ``_load_from_state_dict`` this is called.
        options: which ones, see :meth:`AttentionEvolution.adopt`.
        state_dict: the checkpoint.
        prefix: what stands before the model's names in it.
    """
    before = after = None
    for name, module in model.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, AttentionEvolution):
            before = before or module.extra_repr()
            module.adopt(state_dict, f"{name}.", options)
            after = after or module.extra_repr()
    if before != after:
        logger.info("%s: as in the checkpoint, %s", type(model).__name__, after)
