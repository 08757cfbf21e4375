"""Taking over the weights of a model that does not evolve."""

import logging
from typing import Dict

from torch import Tensor, nn

logger = logging.getLogger(__name__)


def keep_fresh(model: nn.Module, part: str, state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Lets a checkpoint without any `part` leave this part of the model as it is.

    So does one in which only alpha and beta are missing, because it did not learn them. In all
    other cases whatever does not match fails, as timm has it.

    Args:
        model: the whole model, so that a checkpoint which lacks but some of it is refused.
        part: the name of the submodules, "evolution".
        state_dict: the checkpoint as ``_load_from_state_dict`` gets it, to be completed.
        prefix: of the model's names in it.
    """
    own = {
        key: value
        for key, value in model.state_dict(prefix=prefix).items()
        if f".{part}." in key and not value.is_meta
    }
    fresh = own.keys() - state_dict.keys()
    mixing = {key for key in own if key.endswith((".evolution.alpha", ".evolution.beta"))}
    if fresh == own.keys() or fresh == mixing:
        for key in sorted(fresh):
            state_dict[key] = own[key]
            logger.info("not in the checkpoint, stays fresh: %s", key)
