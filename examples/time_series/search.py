#!/usr/bin/env python3
"""Compare options of the classifier on development tasks, to choose its defaults.

    python examples/time_series/search.py --folder data/uea --json examples/time_series/search.json

The tasks are made of training splits only: part of the cases trains, the others are predicted. The
base is the defaults, but for one network trained for 100 epochs; each variant changes one option of
it. FOLDER holds NATOPS and UWaveGestureLibrary; the other data sets are included in aeon.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional

import numpy as np
from jobs import Record, by, read
from jobs import run as run_jobs

from ea_aeon import EADCTransformerClassifier
from ea_aeon.data import BUNDLED
from ea_aeon.data import read as read_series
from evolving_attention.commands import DataError, check_output

SCRIPT = "examples/time_series/search.py"


class Task(NamedTuple):
    """Part of a training split.

    Attributes:
        data: name of the data set.
        step: so many neighbouring steps are averaged, which makes the series shorter.
        per_class: cases of each class to train on, at most all but one.
    """

    data: str
    step: int
    per_class: int


TASKS = {
    "gestures": Task("UWaveGestureLibrary", 5, 4),
    "signals": Task("NATOPS", 1, 6),
    "motions": Task("BasicMotions", 2, 3),
    "gun": Task("GunPoint", 3, 12),
    "arrows": Task("ArrowHead", 5, 6),
    "pickup": Task("PickupGestureWiimoteZ", 5, 3),
    "vowels": Task("JapaneseVowels", 1, 6),
}
FOLDS = (1, 2)

BASE = {"n_epochs": 100, "n_estimators": 1}  # less than the defaults train, to save time
VARIANTS: Dict[str, Dict[str, Any]] = {
    "base": {},
    "the defaults": {"n_epochs": None, "n_estimators": None},
    "4 heads": {"num_heads": 4},
    "plain attention": {"alpha": 0.0, "beta": 0.0},
    "convolutions only": {"attention_dim": 0},
    "no differences": {"differences": 0},
    "at least 600 updates": {"n_epochs": None},
    "3 estimators": {"n_estimators": 3},
    "no positions": {"positions": "none"},
    "learned positions": {"positions": "learned"},
    "mean": {"readout": "mean"},
    "flatten": {"readout": "flatten"},
    "8 segments": {"num_segments": 8},
    "kernel 5": {"kernel_size": 5},
    "batches of 8": {"batch_size": 8},
    "constant learning rate": {"lr_schedule": "constant"},
    "20 % held out": {"validation_fraction": 0.2},
    "weight decay 0.05": {"weight_decay": 0.05},
    "learning rate 3e-3": {"lr": 3e-3},
    "dropout 0.3": {"dropout": 0.3},
    "alpha 0.1, beta 0.1": {"alpha": 0.1, "beta": 0.1},
}


def shorter(case: np.ndarray, step: int) -> np.ndarray:
    """Means over `step` neighbouring steps; (channels, steps) -> (channels, steps / step)."""
    length = case.shape[1] // step * step
    return case[:, :length].reshape(len(case), -1, step).mean(axis=2)


def score(
    task: Task, folder: Optional[str], fold: int, options: Dict[str, Any]
) -> Dict[str, float]:
    """Accuracy on the cases that a draw by `fold` leaves.

    `single` is the mean accuracy of the networks of an ensemble, one by one.
    """
    data = read_series(task.data, "train", None if (BUNDLED / task.data).is_dir() else folder)
    series = [shorter(case, task.step) for case in data.series]
    order = np.random.default_rng(fold).permutation(len(series))
    drawn: List[int] = []
    for label in np.unique(data.targets):
        own = [index for index in order if data.targets[index] == label]
        drawn += own[: min(task.per_class, len(own) - 1)]
    rest = np.setdiff1d(order, drawn)
    classifier = EADCTransformerClassifier(random_state=fold, device="cpu", **options)
    classifier.fit([series[index] for index in drawn], data.targets[drawn])
    longest = max(series[index].shape[1] for index in drawn)  # the most that flatten can read
    networks = [classifier.network_, *getattr(classifier.network_, "members", [])]
    scores = []
    for classifier.network_ in networks:
        predictions = classifier.predict([series[index][:, :longest] for index in rest])
        scores.append(float(np.mean(predictions == data.targets[rest])))
    return {"score": scores[0], "single": statistics.mean(scores[1:] or scores)}


def job(variant: str, name: str, folder: Optional[str], fold: int) -> Record:
    """Trains and scores one variant on one draw of a task."""
    options = {**BASE, **VARIANTS[variant]}
    return {
        "name": f"{variant}, {name}, draw {fold}",
        "variant": variant,
        "options": options,
        "task": name,
        "fold": fold,
        **score(TASKS[name], folder, fold, options),
    }


def key(record: Record) -> Hashable:
    return record["variant"], str(record["options"]), record["task"], record["fold"]


def table(records: List[Record]) -> List[str]:
    """One row per variant, best first; each cell is the mean of the draws."""
    means: Dict[str, List[float]] = {}
    for (variant,), found in by(records, "variant").items():
        tasks = by(found, "task")
        if len(found) < len(TASKS) * len(FOLDS):
            continue  # not finished
        for kind, about in (("score", ""), ("single", ", each network by itself")):
            if kind == "score" or variant == "the defaults":
                means[variant + about] = [
                    statistics.mean(x[kind] for x in tasks[name,]) for name in TASKS
                ]
    rows = sorted(means, key=lambda variant: -statistics.mean(means[variant]))
    return [
        f"| | mean | {' | '.join(TASKS)} |",
        f"|---|---:|{'---:|' * len(TASKS)}",
        *(
            f"| {variant} | {statistics.mean(means[variant]):.3f} | "
            f"{' | '.join(f'{value:.3f}' for value in means[variant])} |"
            for variant in rows
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="holds DATASET/DATASET_TRAIN.ts; default: download")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every score there; if it exists, train only what is missing",
    )
    args = parser.parse_args()
    jobs: Dict[Hashable, Callable[[], Record]] = {}
    for variant in args.variants:
        for name in TASKS:
            for fold in FOLDS:
                about = {"variant": variant, "options": {**BASE, **VARIANTS[variant]}}
                about |= {"task": name, "fold": fold}
                jobs[key(about)] = partial(job, variant, name, args.folder, fold)
    try:
        if args.json:  # before anything takes time
            read(args.json, SCRIPT)
            check_output(args.json, overwrite=True)
        records = run_jobs(jobs, key, args.json, SCRIPT)
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"search.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("search.py: interrupted; with --json, the same command goes on where it stopped")
    print("", *table(records), sep="\n")


if __name__ == "__main__":
    main()
