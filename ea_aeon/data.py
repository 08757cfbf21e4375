"""Reads time series, fills their gaps, standardises them and makes batches of them."""

import gzip
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import aeon.datasets
import numpy as np
import torch
from aeon.datasets.tser_datasets import tser_soton
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BUNDLED = Path(aeon.datasets.__file__).parent / "data"


class TimeSeries(NamedTuple):
    """One split of a data set.

    Attributes:
        series: one array (channels, steps) per case; NaN where a value is missing.
        targets: class labels, or numbers for regression.
        is_regression: whether the targets are numbers.
    """

    series: List[np.ndarray]
    targets: np.ndarray
    is_regression: bool


def read(name: str, split: str, folder: Optional[str] = None) -> TimeSeries:
    """Reads the official TRAIN or TEST split of a UEA, UCR or TSER data set with aeon.

    Args:
        name: of the data set, for example "JapaneseVowels".
        split: "train" or "test".
        folder: holds `name`/`name`_TRAIN.ts or `name`_TRAIN.ts, also as .ts.gz. None: the data set
            comes from aeon, which downloads it unless aeon includes it.

    Raises:
        FileNotFoundError: there is no such file in `folder`.
        ValueError: the file has no series, or neither class labels nor target values.
    """
    if folder is None and not (BUNDLED / name).is_dir():
        load = aeon.datasets.load_classification
        if name in tser_soton:
            load = aeon.datasets.load_regression
        series, targets = load(name, split=split)
        return TimeSeries(list(series), targets, name in tser_soton)
    path = find(name, split, BUNDLED if folder is None else Path(folder))
    if path.suffix == ".gz":
        with gzip.open(path) as packed, tempfile.NamedTemporaryFile(suffix=".ts") as file:
            shutil.copyfileobj(packed, file)
            file.flush()
            series, targets, about = read_ts(file.name)
    else:
        series, targets, about = read_ts(path)
    if not len(series):
        raise ValueError(f"{path} holds no series: it must have them after a line @data")
    if not about["classlabel"] and not about["targetlabel"]:
        raise ValueError(
            f"{path} must have @classlabel true or @targetlabel true, so that there is a target"
        )
    return TimeSeries(list(series), targets, about["targetlabel"])


def read_ts(path: Union[str, os.PathLike]) -> Tuple:
    return aeon.datasets.load_from_ts_file(str(path), return_meta_data=True)


def find(name: str, split: str, folder: Path) -> Path:
    """The file of a split. Raises FileNotFoundError if there is none."""
    file = f"{name}_{split.upper()}.ts"
    tried = [base / f"{file}{end}" for base in (folder / name, folder) for end in ("", ".gz")]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no {file} or {file}.gz in {folder / name} or {folder}")


@dataclass
class Preparation:
    """Fills gaps, standardises each channel and adds the differences of neighbouring steps.

    The statistics are those of the training series.

    Attributes:
        mean, std: of each channel over all steps.
        difference_scales: for each order of differences, the root mean square of each channel.
    """

    mean: List[float]
    std: List[float]
    difference_scales: List[List[float]] = field(default_factory=list)

    @classmethod
    def fit(cls, series: Sequence[np.ndarray], differences: int = 0) -> "Preparation":
        """Computes the statistics of training series (channels, steps), ignoring NaNs.

        Args:
            differences: orders of differences to add: 0 for none, 1 for the change from step to
                step, 2 also for its change.

        Raises:
            ValueError: `differences` is not a number of orders, or a series is unfit.
        """
        if not isinstance(differences, Integral) or differences < 0:
            raise ValueError(f"differences must be 0 or more, got {differences!r}")
        check(series, len(series[0]))
        steps = np.concatenate(list(series), axis=1).astype(np.float64)
        seen = ~np.isnan(steps)
        counts = np.maximum(seen.sum(axis=1), 1)
        mean = np.where(seen, steps, 0).sum(axis=1) / counts
        deviation = np.where(seen, steps - mean[:, None], 0)
        std = np.sqrt((deviation**2).sum(axis=1) / counts)
        if not np.isfinite(std).all():
            raise ValueError(
                f"channel {int(np.argmin(np.isfinite(std)))} has values too large for double "
                "precision"
            )
        # A constant channel. Time stamps vary by far less than their mean, but by more than this.
        std[std <= 1e-12 * np.abs(mean)] = 1
        preparation = cls(mean.tolist(), std.tolist())
        changes = [preparation.standardise(case) for case in series]
        for _ in range(differences):
            changes = [change(case) for case in changes]
            scale = np.sqrt((np.concatenate(changes, axis=1) ** 2).mean(axis=1))
            scale[scale <= 1e-8] = 1
            preparation.difference_scales.append(scale.tolist())
        return preparation

    @property
    def num_channels(self) -> int:
        """Channels of prepared series."""
        return len(self.mean) * (1 + len(self.difference_scales))

    def __call__(self, series: Sequence[np.ndarray]) -> List[Tensor]:
        """Series (channels, steps) -> float32 tensors (steps, num_channels) without gaps.

        A missing value is interpolated between its neighbours in time; before the first value and
        after the last one, the nearest is taken. A channel without values is 0, the mean.
        """
        check(series, len(self.mean))
        prepared = [self.prepare(case) for case in series]
        for number, case in enumerate(prepared):
            if not case.isfinite().all():
                raise ValueError(f"series {number} has values too large for single precision")
        return prepared

    def prepare(self, case: np.ndarray) -> Tensor:
        """One series, (channels, steps) -> (steps, num_channels)."""
        channels = [self.standardise(case)]
        changes = channels[0]
        for scale in self.difference_scales:
            changes = change(changes)
            channels.append(changes / np.array(scale)[:, None])
        return torch.from_numpy(np.concatenate(channels).T.astype(np.float32))

    def standardise(self, case: np.ndarray) -> np.ndarray:
        """One series, (channels, steps), standardised and without gaps."""
        case = (case - np.array(self.mean)[:, None]) / np.array(self.std)[:, None]
        for channel in case:
            missing = np.isnan(channel)
            if missing.all():
                channel[:] = 0
            elif missing.any():
                steps = np.arange(len(channel))
                channel[missing] = np.interp(steps[missing], steps[~missing], channel[~missing])
        return case


def change(case: np.ndarray) -> np.ndarray:
    """The difference of each step from the one before it; 0 at the first. (channels, steps)."""
    return np.diff(case, axis=1, prepend=case[:, :1])


def check(series: Sequence[np.ndarray], channels: int) -> None:
    """Raises ValueError, naming the case, unless each is (channels, steps) of finite numbers."""
    for number, case in enumerate(series):
        if case.ndim != 2 or len(case) != channels or case.shape[1] < 1:
            raise ValueError(
                f"series {number} must have shape ({channels}, steps), with {channels} channels as "
                f"in training and at least one step, got {case.shape}"
            )
        if np.isinf(case).any():
            raise ValueError(f"series {number} has infinite values; missing values must be NaN")


def pad(series: Sequence[Tensor]) -> Dict[str, Tensor]:
    """The network's arguments: series (steps, channels) as one batch, and their lengths."""
    lengths = torch.tensor([len(case) for case in series])
    return {"series": pad_sequence(list(series), batch_first=True), "lengths": lengths}


def collate(cases: Sequence[Tuple[Tensor, Tensor]]) -> Tuple[Dict[str, Tensor], Tensor]:
    """The network's arguments and the targets, from cases (series, target)."""
    series, targets = zip(*cases, strict=True)
    return pad(series), torch.stack(targets)


def split_off(
    cases: int, fraction: float, seed: int, labels: Optional[Sequence] = None
) -> Tuple[np.ndarray, np.ndarray]:
    """Draws indices to train on and a `fraction` of all cases to validate on.

    At least one case of each label is trained on, and both parts have the labels in about the same
    proportions. There is no validation set if the fraction is less than one case.
    """
    if not isinstance(fraction, Real) or not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction must lie in [0, 1), got {fraction!r}")
    order = np.random.default_rng(seed).permutation(cases)
    labels = np.zeros(cases) if labels is None else np.asarray(labels)
    kept = order[np.unique(labels[order], return_index=True)[1]]  # the first of each label
    rest = order[~np.isin(order, kept)]
    size = min(round(cases * fraction), len(rest))
    rest = rest[np.argsort(labels[rest], kind="stable")]
    even = ((np.arange(size) + 0.5) * len(rest) / max(size, 1)).astype(int)
    validation = np.sort(rest[even])
    return np.setdiff1d(order, validation), validation
