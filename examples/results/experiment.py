"""What an experiment is: one task, trained in several settings from the same initial weights."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
from torch import nn

from evolving_attention import AttentionEvolution

ROOT = Path(__file__).resolve().parents[2]

Options = Dict[str, Any]  # of the evolving attention: alpha, beta, kernel_size, ... and `start`
# How convolutions begin that copy their input: by the number that they add to it.
STARTS = {"identity": 0.0, "shifted": 8.0}

WEIGHTS = "checkpoint_last.pt"  # what a training writes to its folder
PLAIN: Options = {"alpha": 0.0, "beta": 0.0}


class ExperimentError(Exception):
    """A command failed or data are missing; the message says where to look."""


@dataclass
class Result:
    """The outcome of one training.

    Attributes:
        scores: by name, of the weights after the last update.
        curve: (update, first score on the validation data) during training.
        seconds: duration of the training, without evaluation on the test sets.
        learned: each layer's alpha and beta after the training, if they were learned.
    """

    scores: Dict[str, float]
    curve: List[Tuple[int, float]]
    seconds: float
    learned: Optional[List[Tuple[float, float]]] = None


@dataclass
class Experiment:
    """A task and the settings in which it is trained.

    In all settings, the trainings with one seed start from the same weights, apart from those that
    the plain model does not have, and see the same batches in the same order.

    Attributes:
        name: of the experiment on the command line and of its folder of results.
        title: heading in the report.
        about: model, data and training, in one or two sentences.
        scores: names of what is measured; the first one is also that of the learning curve.
        lower_is_better: whether that holds for the first score; all others are better if higher.
        settings: options of the evolving attention by the setting's name. The first one is "plain",
            with which the others are compared.
        seeds: one training for each, in each setting.
        headline: the scores that the README has; None for the first one.
        default: the setting that README and plots show: the model's default options, where they
            were trained.
    """

    name: str
    title: str
    about: str
    scores: Tuple[str, ...]
    lower_is_better: bool
    settings: Dict[str, Options]
    seeds: Tuple[int, ...]
    headline: Optional[Tuple[str, ...]] = field(default=None, kw_only=True)
    default: str = field(default="evolving", kw_only=True)

    def prepare(self, data: Path, work: Path) -> None:
        """Writes what all trainings share to the folder `work`, unless it is there."""
        raise NotImplementedError

    def shortened(self) -> "Experiment":
        """The same with about a minute of training and no scores on test sets, to time it."""
        raise NotImplementedError

    def train(self, options: Options, seed: int, work: Path, run: Path) -> Result:
        """Trains once. `run` is an empty folder for logs and for the weights, :data:`WEIGHTS`."""
        raise NotImplementedError


def sets_start(options: Options) -> bool:
    """Whether the convolutions begin in another way than at random.

    Raises:
        ValueError: the `start` is unknown.
    """
    start = options.get("start")
    if start is not None and start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)} or left out, got {start!r}")
    return start is not None


def set_start(model: nn.Module, options: Options) -> None:
    """Initialises each convolution over the maps as `start` says."""
    for module in model.modules():
        if isinstance(module, AttentionEvolution) and module.weight is not None:
            copy_input(module, STARTS[options["start"]])


def copy_input(evolution: AttentionEvolution, bias: float) -> None:
    """Makes the convolution one that returns A_in + bias.

    A released model, whose weights were trained with plain maps, then begins closer to itself than
    with random convolutions: only the ReLU changes the map, where A_in < -bias.
    """
    last, centre = evolution.kernel_size - 1, evolution.kernel_size // 2
    row = centre if evolution.window == "bidirectional" else last
    column = last if evolution.window == "causal" else centre
    nn.init.constant_(evolution.bias, bias)
    nn.init.zeros_(evolution.weight)
    with torch.no_grad():
        evolution.weight[:, :, row, column].fill_diagonal_(1.0)


def python(arguments: Iterable[object], log: Path) -> str:
    """Runs Python with these arguments on one thread. Returns its output, which `log` keeps.

    Raises:
        ExperimentError: the command failed.
    """
    line = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        file.write(" ".join(line) + "\n")
        file.flush()
        status = subprocess.run(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
    output = log.read_text()
    if status.returncode:
        end = "".join(output.splitlines(keepends=True)[-20:])
        raise ExperimentError(f"a command failed; its output ends:\n{end}")
    return output
