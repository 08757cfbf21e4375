#!/usr/bin/env python3
"""Train on UEA, UCR or TSER data sets and score on their official test split, in a table.

    python examples/time_series/run.py JapaneseVowels BasicMotions
    python examples/time_series/run.py NATOPS --folder data/uea --seeds 1 2 3 --epochs 100

Three networks that differ only in their attention learn each data set: evolving, plain (alpha =
beta = 0) and without attention (only convolutions). The score is accuracy for classification and
the root mean squared error, in the target's own unit, for regression. The test split is used once,
after training.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import numpy as np

from ea_aeon import EADCTransformerClassifier, EADCTransformerRegressor
from ea_aeon.data import TimeSeries, read
from evolving_attention.commands import (
    add_overwrite,
    check_output,
    name_value,
    positive,
    whole_or_not_at_all,
)

NETWORKS = {
    "evolving": {},
    "plain": {"alpha": 0.0, "beta": 0.0},
    "convolutions": {"attention_dim": 0},
}


def score(train: TimeSeries, test: TimeSeries, options: Dict) -> float:
    """Accuracy, or root mean squared error, on `test` after training on `train`."""
    kind = EADCTransformerRegressor if train.is_regression else EADCTransformerClassifier
    predictions = kind(**options).fit(train.series, train.targets).predict(test.series)
    if train.is_regression:
        return float(np.sqrt(np.mean((predictions - test.targets) ** 2)))
    return float(np.mean(predictions == test.targets))


def row(name: str, train: TimeSeries, results: Dict[str, List[float]]) -> str:
    """A line of the table: the mean and, for several seeds, the standard deviation."""
    cells = []
    for values in results.values():
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    metric = "RMSE" if train.is_regression else "accuracy"
    return f"| {name} | {metric} | {' | '.join(cells)} |"


def run(args: argparse.Namespace, options: Dict) -> Iterator[str]:
    """Trains and scores all networks; yields each line of the table when it is ready."""
    data = {
        name: [read(name, split, args.folder) for split in ("train", "test")] for name in args.names
    }
    overwrite = args.overwrite
    scores: Dict[str, Dict[str, List[float]]] = {}
    for name, (train, test) in data.items():
        scores[name] = {network: [] for network in args.networks}
        for network in args.networks:
            for seed in args.seeds:
                begin = time.monotonic()
                given = {**options, **NETWORKS[network], "random_state": seed}
                result = score(train, test, given)
                took = time.monotonic() - begin
                print(f"{name} {network} seed {seed}: {result:.3f} ({took:.0f} s)", flush=True)
                scores[name][network].append(result)
                if args.json:
                    with whole_or_not_at_all(args.json, overwrite) as part:
                        part.write_text(json.dumps(scores, indent=1) + "\n")
                    overwrite = True  # from here on it is our own
        yield row(name, train, scores[name])


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="DATASET")
    parser.add_argument("--folder", help="holds DATASET/DATASET_TRAIN.ts; default: aeon's own")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--epochs", type=positive, default=100, help="at most; default: 100")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=name_value,
        metavar="NAME=VALUE",
        help="of the estimators, for example --option d_model=64 --option lr=0.0005",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every score there")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    known = EADCTransformerClassifier().get_params()
    options = dict(args.option)
    taken = {"n_epochs": "--epochs", "random_state": "--seeds"}
    for name in options:
        if name not in known:
            parser.error(f"--option {name}: there are {', '.join(known)}")
        if name in taken:
            parser.error(f"--option {name}: give {taken[name]} instead")
    options["n_epochs"] = args.epochs
    table = []
    try:
        if args.json:
            check_output(args.json, args.overwrite)  # before anything takes time
        for line in run(args, options):
            table.append(line)
    except (OSError, ValueError) as error:
        sys.exit(f"run.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted")
    finally:
        if table:
            print(f"\n| data set | metric | {' | '.join(args.networks)} |")
            print(f"|---|---|{'---|' * len(args.networks)}", *table, sep="\n")


if __name__ == "__main__":
    main()
