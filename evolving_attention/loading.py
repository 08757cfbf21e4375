"""Loads the weights of plain models into evolving ones."""

import logging
from typing import Any, ClassVar, Collection, Dict, Mapping, Tuple

from torch import Tensor, nn

from evolving_attention.modules import AttentionEvolution, is_number, shortest_number

logger = logging.getLogger(__name__)
# Part of the names of modules with activation checkpointing, but not of those in a state dict.
WRAPPED = "_checkpoint_wrapped_module."


class StartsFromPlainWeights(nn.Module):
    """Base class of a model that also loads the weights of its plain counterpart.

    It comes after the host's class in the list of bases. If a checkpoint has no weight of a fresh
    part, ``strict=True`` keeps the part's initial values and logs one warning; if it has only some
    of them, loading fails. With ``strict=False``, PyTorch lists all of them in `missing_keys`.

    Loading the weights of an evolving model into one that does not evolve fails, too, unless one of
    its modules has `drops_evolution = True`: it leaves them out, as the first layer of its stack.

    Attributes:
        fresh_parts: names of the submodules that the plain model does not have.
    """

    fresh_parts: ClassVar[Tuple[str, ...]] = ("evolution",)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in PyTorch, except for the fresh parts.

        Raises:
            RuntimeError: also if other maps evolve in the checkpoint than in the model.
        """
        if strict:
            self.check_evolution(state_dict)
            state_dict = self.with_fresh_parts(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def check_evolution(self, state_dict: Mapping[str, Any]) -> None:
        """Raises RuntimeError if other maps evolve in the checkpoint than in the model.

        PyTorch reports missing weights of a convolution; where there is none, this does.
        """
        parts = {key.rpartition(".")[0] for key in state_dict if ".evolution." in f".{key}"}
        own = self.state_dict()
        stored = any(f"{part}.alpha" in state_dict for part in parts)  # not by version 0.1.0
        for key in own if stored else ():
            part = key.removesuffix(".alpha")
            absent = f".{key}".endswith(".evolution.alpha") and part not in parts
            if absent and f"{part}.weight" not in own:
                raise RuntimeError(
                    f"in the checkpoint, the map of {part.removesuffix('.evolution')} does not "
                    f"evolve (it has {min(parts)}, ...): make this {type(self).__name__} with the "
                    "layers and the attentions that evolve in the checkpoint"
                )
        if not parts or any(
            isinstance(module, AttentionEvolution) or getattr(module, "drops_evolution", False)
            for module in self.modules()
        ):
            return
        part = min(parts)
        names = [f"{part}.{name}" for name in ("alpha", "beta")]
        trained = "evolving attention"
        if all(is_number(state_dict.get(name)) for name in names):
            alpha, beta = (shortest_number(state_dict[name]) for name in names)
            trained = f"alpha={alpha}, beta={beta}"
        raise RuntimeError(
            f"the checkpoint was trained with {trained} (it has {part}), but in this "
            f"{type(self).__name__} no map evolves: make it with the checkpoint's alpha and beta, "
            "and with more than one layer"
        )

    def with_fresh_parts(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state dict, with the initial values of the fresh parts that it has nothing of."""
        fresh: Dict[str, Tensor] = {}
        for part in self.fresh_parts:
            known = any(f".{part}." in f".{name}" for name in state_dict)
            # named_parameters would give other names than a state dict to modules that are wrapped.
            for name, value in self.state_dict(keep_vars=True).items():
                mine = isinstance(value, nn.Parameter) and f".{part}." in f".{name}"
                if mine and not known and not value.is_meta:
                    fresh[name] = value.detach()
        if not fresh:
            self.warn_of_plain_maps(state_dict)
            return state_dict
        logger.warning(
            "%d weights of %s are not in the checkpoint and keep their initial values: %s, ...",
            len(fresh),
            type(self).__name__,
            next(iter(fresh)),
        )
        return {**state_dict, **fresh}

    def warn_of_plain_maps(self, state_dict: Mapping[str, Any]) -> None:
        """Logs a warning if only the model's maps evolve, without any weight of their own."""
        if any(".evolution." in f".{name}" for name in state_dict):
            return
        for module in self.modules():
            if not isinstance(module, AttentionEvolution):
                continue
            if module.weight is None and any(module.mixing):
                logger.warning(
                    "the checkpoint has neither alpha nor beta, like that of a plain model, but in "
                    "this %s maps evolve with alpha=%s, beta=%s",
                    type(self).__name__,
                    *module.mixing,
                )
                return


def adopt_options(
    model: nn.Module, options: Collection[str], state_dict: Dict[str, Tensor], prefix: str
) -> None:
    """Gives each evolution in `model` the options that the checkpoint was trained with.

    Args:
        model: calls this in its ``_load_from_state_dict``.
        options: which options, see :meth:`AttentionEvolution.adopt`.
        state_dict: the checkpoint.
        prefix: what stands before the model's names in it.
    """
    before = after = None
    for name, module in model.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, AttentionEvolution):
            before = before or module.extra_repr()
            module.adopt(state_dict, f"{name.replace(WRAPPED, '')}.", options)
            after = after or module.extra_repr()
    if before != after:
        logger.info("%s: as in the checkpoint, %s", type(model).__name__, after)
