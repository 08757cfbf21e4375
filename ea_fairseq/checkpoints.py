"""Lets torch >= 2.6, which unpickles only what it knows, load fairseq's checkpoints."""

import argparse
from pickle import UnpicklingError
from typing import Any, Tuple

import numpy as np
import torch


class PickledDtype:
    """Stands in for numpy's dtype, which believes whatever memory layout a pickle tells it."""

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
            raise UnpicklingError("a checkpoint's arrays hold numbers alone")
        super().__setstate__((1, shape, np.dtype(dtype.code), fortran_order, content))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def empty_array(*_: Any) -> PickledArray:
    """What a pickled array is before its content comes."""
    return np.empty(0, dtype=np.int8).view(PickledArray)


def number(dtype: PickledDtype, content: bytes) -> Any:
    """A pickled numpy number."""
    return np.frombuffer(content, dtype=dtype.code, count=1)[0]


def allow_checkpoints() -> None:
    """Allows the few types that fairseq's checkpoints hold; all else stays refused.

    They are the options (a namespace) and, with --eval-bleu, n-gram counts and scores (numpy).
    """
    torch.serialization.add_safe_globals(
        [
            # A pair: timm allows the bare type for each of its loads, and forbids it afterwards.
            (argparse.Namespace, "argparse.Namespace"),
            (PickledDtype, "numpy.dtype"),
            (PickledArray, "numpy.ndarray"),
            # numpy 1 and numpy 2 name the module differently.
            (empty_array, "numpy.core.multiarray._reconstruct"),
            (empty_array, "numpy._core.multiarray._reconstruct"),
            (number, "numpy.core.multiarray.scalar"),
            (number, "numpy._core.multiarray.scalar"),
        ]
    )
