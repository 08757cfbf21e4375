#!/usr/bin/env python3
"""Train on UEA, UCR or TSER data sets and score on their official test split, in a table.

    python examples/time_series/run.py JapaneseVowels BasicMotions
    python examples/time_series/run.py NATOPS --folder data/uea --peers --seeds 1 2 3 4 5

Three networks that differ only in their attention learn each data set: evolving, plain (alpha =
beta = 0) and without attention (only convolutions). --peers adds aeon's classifiers, or regressors.
The score is accuracy for classification and the root mean squared error, in the target's own unit,
for regression. The test split is used once, after training.
"""

import argparse
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Tuple

import numpy as np
from aeon.classification.convolution_based import (
    MiniRocketClassifier,
    MultiRocketHydraClassifier,
    RocketClassifier,
)
from aeon.classification.deep_learning import (
    InceptionTimeClassifier,
    IndividualInceptionClassifier,
)
from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier
from aeon.pipeline import make_pipeline
from aeon.regression.convolution_based import (
    MiniRocketRegressor,
    MultiRocketHydraRegressor,
    RocketRegressor,
)
from aeon.regression.deep_learning import InceptionTimeRegressor, IndividualInceptionRegressor
from aeon.regression.distance_based import KNeighborsTimeSeriesRegressor
from aeon.transformations.collection import SimpleImputer
from aeon.transformations.collection.unequal_length import Padder
from jobs import Record, by, read
from jobs import run as run_jobs

from ea_aeon import EADCTransformerClassifier, EADCTransformerRegressor
from ea_aeon.data import TimeSeries
from ea_aeon.data import read as read_series
from evolving_attention.commands import DataError, check_output, name_value, positive

SCRIPT = "examples/time_series/run.py"
NETWORKS = {
    "evolving": {},
    "plain": {"alpha": 0.0, "beta": 0.0},
    "convolutions": {"attention_dim": 0},
}


class Peer(NamedTuple):
    """A method of aeon with its default options.

    Attributes:
        classifier, regressor: classes.
        has_seed: whether its result depends on `random_state`.
    """

    classifier: Any
    regressor: Any
    has_seed: bool = True


PEERS = {
    "MiniRocket": Peer(MiniRocketClassifier, MiniRocketRegressor),
    "ROCKET": Peer(RocketClassifier, RocketRegressor),
    "MultiRocket-Hydra": Peer(MultiRocketHydraClassifier, MultiRocketHydraRegressor),
    "1-NN DTW": Peer(KNeighborsTimeSeriesClassifier, KNeighborsTimeSeriesRegressor, False),
}
NEEDS_TENSORFLOW = {
    "Inception": Peer(IndividualInceptionClassifier, IndividualInceptionRegressor),
    "InceptionTime": Peer(InceptionTimeClassifier, InceptionTimeRegressor),  # five of these
}


def estimator(method: str, is_regression: bool, options: Dict, seed: int) -> Any:
    """One of ours with `options`, or a peer with aeon's defaults."""
    if method in NETWORKS:
        kind = EADCTransformerRegressor if is_regression else EADCTransformerClassifier
        return kind(**{**options, **NETWORKS[method], "random_state": seed})
    peer = {**PEERS, **NEEDS_TENSORFLOW}[method]
    kind = peer.regressor if is_regression else peer.classifier
    return kind(random_state=seed) if peer.has_seed else kind()


def prepared(model: Any, cases: List[np.ndarray]) -> Any:
    """The model behind what aeon has for the gaps and the lengths that it does not take itself."""
    steps: List[Any] = []
    if any(np.isnan(x).any() for x in cases) and not model.get_tag("capability:missing_values"):
        steps.append(SimpleImputer())
    lengths = {case.shape[1] for case in cases}
    if len(lengths) > 1 and not model.get_tag("capability:unequal_length"):
        steps.append(Padder(max(lengths)))
    return make_pipeline(*steps, model) if steps else model


def score(model: Any, train: TimeSeries, test: TimeSeries) -> float:
    """Accuracy, or root mean squared error, on `test` after training on `train`."""
    model = prepared(model, train.series + test.series)
    sets = [train.series, test.series]
    if len({case.shape[1] for case in train.series + test.series}) == 1:
        sets = [np.stack(series) for series in sets]
    predictions = model.fit(sets[0], train.targets).predict(sets[1])
    if train.is_regression:
        return float(np.sqrt(np.mean((predictions - test.targets) ** 2)))
    return float(np.mean(predictions == test.targets))


def job(data: str, splits: List[TimeSeries], method: str, seed: int, options: Dict) -> Record:
    """Trains and scores one model."""
    train, test = splits
    model = estimator(method, train.is_regression, options, seed)
    return {
        "name": f"{data}, {method}, seed {seed}",
        "data": data,
        "method": method,
        "seed": seed,
        "options": options if method in NETWORKS else {},
        "metric": "RMSE" if train.is_regression else "accuracy",
        "score": score(model, train, test),
    }


def key(record: Record) -> Hashable:
    """What tells a job from others: data set, method, seed and options."""
    return (
        record["data"],
        record["method"],
        record["seed"],
        tuple(sorted((name, str(value)) for name, value in record["options"].items())),
    )


def jobs_of(args: argparse.Namespace, options: Dict) -> Dict[Hashable, Callable[[], Record]]:
    """The trainings that the command asks for, seed by seed, so that early tables have all rows."""
    jobs: Dict[Hashable, Callable[[], Record]] = {}
    for name in args.names:
        splits = [read_series(name, split, args.folder) for split in ("train", "test")]
        if splits[0].is_regression and "class_weight" in options:
            raise DataError(f"--option class_weight: {name} is a regression, which has no classes")
        for seed in args.seeds:
            for method in args.methods:
                if method in PEERS and not PEERS[method].has_seed and seed != args.seeds[0]:
                    continue
                given = options if method in NETWORKS else {}
                about: Record = {"data": name, "method": method, "seed": seed, "options": given}
                jobs[key(about)] = partial(job, name, splits, method, seed, options)
    return jobs


def spread(values: List[float]) -> str:
    """The mean and, for several seeds, the standard deviation."""
    end = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{end}"


def difference(ours: List[Record], plain: List[Record]) -> str:
    """The mean of the paired differences and its standard error."""
    scores = [{record["seed"]: record["score"] for record in side} for side in (ours, plain)]
    pairs = [scores[0][seed] - scores[1][seed] for seed in scores[0] if seed in scores[1]]
    if not pairs:
        return ""
    end = ""
    if len(pairs) > 1:
        end = f" ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.3f}"
    return f"{statistics.mean(pairs):+.3f}{end}"


def table(records: List[Record]) -> List[str]:
    """One row per method, one column per data set."""
    groups = by(records, "method", "data")
    data = list(dict.fromkeys((x["data"], x["metric"]) for x in records))
    rows: List[Tuple[str, List[str]]] = []
    for method in dict.fromkeys(record["method"] for record in records):
        cells = []
        for name, _ in data:
            found = groups.get((method, name), [])
            seconds = statistics.median(x["seconds"] for x in found) if found else 0
            cells.append(f"{spread([x['score'] for x in found])}, {seconds:.0f} s" if found else "")
        rows.append((method, cells))
        if method == "plain":
            rows.append(
                (
                    "evolving - plain",
                    [
                        difference(groups.get(("evolving", name), []), groups[method, name])
                        if (method, name) in groups
                        else ""
                        for name, _ in data
                    ],
                )
            )
    return [
        f"| | {' | '.join(f'{name}, {metric}' for name, metric in data)} |",
        f"|---|{'---|' * len(data)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="DATASET")
    parser.add_argument("--folder", help="holds DATASET/DATASET_TRAIN.ts; default: aeon's own")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*NETWORKS, *PEERS, *NEEDS_TENSORFLOW],
        help="default: evolving, plain and convolutions",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help=f"also train {', '.join(PEERS)} ({' and '.join(NEEDS_TENSORFLOW)}, which take long "
        "on a CPU and need tensorflow, only by --methods)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--epochs", type=positive, help="default: the estimators' own")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=name_value,
        metavar="NAME=VALUE",
        help="of our estimators, for example --option d_model=128 --option lr=0.0005",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every score there; if it exists, train only what is missing",
    )
    args = parser.parse_args(argv)
    args.methods = args.methods or [*NETWORKS]
    if args.peers:
        args.methods = list(dict.fromkeys([*args.methods, *PEERS]))
    known = EADCTransformerClassifier().get_params()
    options = dict(args.option)
    taken = {"n_epochs": "--epochs", "random_state": "--seeds"}
    for name in options:
        if name not in known:
            parser.error(f"--option {name}: there are {', '.join(known)}")
        if name in taken:
            parser.error(f"--option {name}: give {taken[name]} instead")
    if args.epochs:
        options["n_epochs"] = args.epochs
    try:
        if args.json:  # before anything takes time
            read(args.json, SCRIPT)
            check_output(args.json, overwrite=True)
        records = run_jobs(jobs_of(args, options), key, args.json, SCRIPT)
    except (DataError, OSError, ValueError, ImportError) as error:
        sys.exit(f"run.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; with --json, the same command goes on where it stopped")
    print("", *table(records), sep="\n")


if __name__ == "__main__":
    main()
