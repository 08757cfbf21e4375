"""fairseq's checkpoints: what torch >= 2.6 may unpickle, and the options that they hold."""

import argparse
import re
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pickle import UnpicklingError
from typing import Any, Callable, ContextManager, Dict, Iterator, Mapping, Tuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf, open_dict


class PickledDtype:
    """Stands in for numpy's dtype, which trusts any memory layout that a pickle claims."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in ("i8", "f8"):
            raise UnpicklingError(f"a checkpoint's numbers are of type i8 or f8, not {code!r}")
        self.code = code

    def __setstate__(self, state: Tuple) -> None:
        if state[1] not in ("<", "=", "|"):
            raise UnpicklingError(f"a checkpoint's numbers are little-endian, not {state[1]!r}")


class PickledArray(np.ndarray):
    """An array of numbers from a checkpoint; saved again, it is numpy's plain array."""

    def __setstate__(self, state: Tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, PickledDtype) or not isinstance(content, bytes):
            raise UnpicklingError("a checkpoint's arrays hold only numbers")
        super().__setstate__((1, shape, np.dtype(dtype.code), fortran_order, content))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def empty_array(*_: Any) -> PickledArray:
    """A pickled array before its content is set."""
    return np.empty(0, dtype=np.int8).view(PickledArray)


def number(dtype: PickledDtype, content: bytes) -> Any:
    """A pickled numpy number."""
    return np.frombuffer(content, dtype=dtype.code, count=1)[0]


class PickledMeter(OrderedDict):
    """A meter that fairseq <= 0.9 pickled, as a dictionary of its attributes."""

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.update(state)

    def __reduce_ex__(self, protocol: int) -> Any:
        return OrderedDict(self).__reduce_ex__(protocol)


def allow_checkpoints() -> None:
    """Lets torch.load read the few types that fairseq's checkpoints hold, and no others.

    They are the options (a namespace); from fairseq <= 0.9, meters, whose module has had two names;
    and with --eval-bleu, n-gram counts and scores (numpy), which only fairseq's own loads may read:
    elsewhere, such as in the random states that transformers saves, numpy's names keep their
    meaning.
    """
    meters = [
        (PickledMeter, f"fairseq.{module}.{name}")
        for module in ("meters", "logging.meters")
        for name in ("AverageMeter", "TimeMeter", "StopwatchMeter")
    ]
    # A pair: timm allows the bare type for each of its loads, and forbids it afterwards.
    options = (argparse.Namespace, "argparse.Namespace")
    torch.serialization.add_safe_globals([options, *meters])
    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        setattr(checkpoint_utils, name, within(numbers_allowed, getattr(checkpoint_utils, name)))
    # The first process of a training sends the checkpoint that it has read to the others, which
    # need not distrust it.
    distributed_utils._broadcast_object_slow = within(
        anything_allowed, distributed_utils._broadcast_object_slow
    )


def within(context: Callable[[], ContextManager], function: Callable) -> Callable:
    """The function, each call of which runs in the context."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return run


@contextmanager
def anything_allowed() -> Iterator[None]:
    """Lets torch.load read any type."""
    load = torch.load
    torch.load = partial(load, weights_only=False)
    try:
        yield
    finally:
        torch.load = load


def numbers_allowed() -> ContextManager[None]:
    """Lets torch.load read the numpy arrays and numbers of a checkpoint, and only numbers."""
    return torch.serialization.safe_globals(
        [
            (PickledDtype, "numpy.dtype"),
            (PickledArray, "numpy.ndarray"),
            # numpy 1 and numpy 2 name the module differently.
            (empty_array, "numpy.core.multiarray._reconstruct"),
            (empty_array, "numpy._core.multiarray._reconstruct"),
            (number, "numpy.core.multiarray.scalar"),
            (number, "numpy._core.multiarray.scalar"),
        ]
    )


def prune_only_once() -> None:
    """Lets a pruned model of ours be loaded and trained further with the options that pruned it.

    With ``--encoder-layers-to-keep`` or ``--decoder-layers-to-keep``, fairseq prunes whatever it
    loads, also what was pruned before, and drops all layers of a side that is not named.
    """
    prune = checkpoint_utils.prune_state_dict

    @wraps(prune)
    def prune_state_dict(state_dict: Mapping[str, Any], model_cfg: Any) -> Any:
        if hasattr(model_cfg, "ea_alpha"):
            name_all_layers(state_dict, model_cfg)
        return prune(state_dict, model_cfg)

    checkpoint_utils.prune_state_dict = prune_state_dict


def name_all_layers(state_dict: Mapping[str, Any], cfg: Any) -> None:
    """If layers are to be kept, sets the option of a side that needs no pruning to all layers."""
    options = ("encoder_layers_to_keep", "decoder_layers_to_keep")
    kept = {option: getattr(cfg, option, None) for option in options}
    if not any(kept.values()):
        return
    for option, layers in kept.items():
        pattern = rf"{option.partition('_')[0]}\..*?\blayers\.(\d+)\."
        found = {int(match[1]) for match in map(re.compile(pattern).match, state_dict) if match}
        if found and (not layers or len(layers.split(",")) == len(found)):
            with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
                setattr(cfg, option, ",".join(map(str, sorted(found))))


def options_of(state: Mapping[str, Any], part: str) -> Dict[str, Any]:
    """The options of `part` ("model" or "checkpoint") that a checkpoint was trained with.

    A checkpoint of fairseq <= 0.10 has all options in one namespace.
    """
    options = state.get("args")
    if options is None:
        options = (state.get("cfg") or {}).get(part) or {}
    return dict(vars(options) if isinstance(options, argparse.Namespace) else options)
