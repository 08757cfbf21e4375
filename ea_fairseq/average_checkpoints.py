"""Averages the weights of checkpoints: ``python -m ea_fairseq.average_checkpoints --help``.

It has the flags of fairseq's ``scripts/average_checkpoints.py``, which is not part of fairseq's
package and cannot load its checkpoints with torch >= 2.6.
"""

import argparse
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from ea_fairseq.checkpoints import numbers_allowed, options_of
from ea_fairseq.models.options import evolution_of
from evolving_attention.commands import add_overwrite, check_output, positive, whole_or_not_at_all


def load(path: Path) -> Dict:
    """The checkpoint at `path`, on the CPU.

    Raises:
        ValueError: `path` is no checkpoint, or holds objects that could run code.
    """
    try:
        with numbers_allowed():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint, or holds objects that torch may not load, since they could "
            f"run code: {error}"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a file may hold anything
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({error!r})") from None
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path} is no checkpoint of fairseq: it has no 'model' of tensors")
    return state


def average_checkpoints(paths: List[Path]) -> Dict:
    """The first checkpoint, with the mean weights of all checkpoints.

    Sums are computed in float64; the means get the dtypes of the first checkpoint.

    Raises:
        ValueError: no path, or a checkpoint of another model than the first: with weights of other
            names or shapes, or trained with other options of the evolving attention.
    """
    if not paths:
        raise ValueError("no checkpoint to average")
    result = load(paths[0])
    shapes = {name: weight.shape for name, weight in result["model"].items()}
    sums: Dict[str, Tensor] = {name: w.double() for name, w in result["model"].items()}
    evolution = evolution_of(options_of(result, "model"))
    for path in paths[1:]:
        state = load(path)
        weights = state["model"]
        other = evolution_of(options_of(state, "model"))
        if other != evolution:
            raise ValueError(
                f"{path} was trained with {text_of(other)}, but {paths[0]} with "
                f"{text_of(evolution)}: average only checkpoints of one model"
            )
        if {name: weight.shape for name, weight in weights.items()} != shapes:
            raise ValueError(f"{path} holds other weights than {paths[0]}: not the same model")
        for name, weight in weights.items():
            sums[name] = sums[name] + weight
    for name, weight in result["model"].items():
        result["model"][name] = (sums[name] / len(paths)).to(weight.dtype)
    return result


def text_of(evolution: Dict[str, Any]) -> str:
    """Options as they are given on the command line."""
    named = {f"--{name.replace('_', '-')}": value for name, value in evolution.items()}
    given = ((name, value) for name, value in named.items() if value is not False)
    return " ".join(name if value is True else f"{name} {value}" for name, value in given)


def last_checkpoints(
    folder: Path, count: int, by_updates: bool, upper_bound: Optional[int]
) -> List[Path]:
    """The last `count` checkpoints of epochs, or of updates, in `folder`, newest first."""
    pattern = r"checkpoint_\d+_(\d+)\.pt" if by_updates else r"checkpoint(\d+)\.pt"
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(pattern, path.name)
        if match and (upper_bound is None or int(match[1]) <= upper_bound):
            found[int(match[1])] = path
    if len(found) < count:
        raise ValueError(f"{folder} holds {len(found)} such checkpoints, but {count} are needed")
    return [found[number] for number in sorted(found, reverse=True)[:count]]


def best_checkpoints(paths: List[Path], count: int, maximize: bool) -> List[Path]:
    """The `count` best of checkpoints with the names that --keep-best-checkpoints gives them.

    Args:
        maximize: the highest metric is the best, not the lowest.

    Raises:
        ValueError: a checkpoint with another name, or with another metric than the first.
    """
    found: Dict[Path, float] = {}
    metrics = set()
    for path in paths:
        match = re.fullmatch(r"checkpoint\.best_(.+)_(-?\d+(?:\.\d+)?)\.pt", path.name)
        if not match:
            raise ValueError(
                f"{path} must be named like checkpoint.best_loss_3.21.pt, which says how good it is"
            )
        metrics.add(match[1])
        found[path] = float(match[2])
    if len(metrics) > 1:
        raise ValueError(f"the checkpoints are named after several metrics: {sorted(metrics)}")
    return sorted(paths, key=found.__getitem__, reverse=maximize)[:count]


def maximizes(path: Path) -> bool:
    """Whether the training that wrote the checkpoint took the highest metric for the best."""
    return bool(options_of(load(path), "checkpoint").get("maximize_best_checkpoint_metric", False))


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ea_fairseq.average_checkpoints",
        description="Average the weights of checkpoints into a new one.",
    )
    parser.add_argument(
        "--inputs", required=True, nargs="+", type=Path, help="checkpoints, or one folder of them"
    )
    parser.add_argument("--output", required=True, type=Path, help="the checkpoint to write")
    add_overwrite(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num-epoch-checkpoints",
        type=positive,
        metavar="N",
        help="the last N checkpointEPOCH.pt of the folder",
    )
    which.add_argument(
        "--num-update-checkpoints",
        type=positive,
        metavar="N",
        help="the last N checkpoint_EPOCH_UPDATE.pt of the folder",
    )
    which.add_argument(
        "--num-best-checkpoints",
        type=positive,
        metavar="N",
        help="the N best of the inputs, checkpoint.best_METRIC_VALUE.pt: those with the highest "
        "value if they were trained with --maximize-best-checkpoint-metric, else with the lowest",
    )
    parser.add_argument(
        "--checkpoint-upper-bound",
        type=int,
        metavar="N",
        help="ignore later epochs, or updates",
    )
    args = parser.parse_args(argv)
    by_number = args.num_epoch_checkpoints or args.num_update_checkpoints
    if args.checkpoint_upper_bound is not None and not by_number:
        parser.error(
            "--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints"
        )
    if by_number and not (len(args.inputs) == 1 and args.inputs[0].is_dir()):
        parser.error("--inputs must be one folder if a number of its checkpoints is averaged")
    if not by_number:
        folders = [str(path) for path in args.inputs if path.is_dir()]
        if folders:
            parser.error(
                f"{', '.join(folders)} is a folder: name its checkpoints, or add "
                "--num-epoch-checkpoints N or --num-update-checkpoints N"
            )
        missing = [str(path) for path in args.inputs if not path.is_file()]
        if missing:
            parser.error(f"no such file: {', '.join(missing)}")
    try:
        check_output(args.output, args.overwrite)
    except OSError as error:
        parser.error(f"--output: {error}")
    if (args.num_best_checkpoints or 0) > len(args.inputs):
        parser.error(f"--num-best-checkpoints: there are only {len(args.inputs)} inputs")
    return args


def main(argv: Optional[List[str]] = None) -> None:
    """Runs the command; exits with a message if it fails."""
    args = parse_args(argv)
    by_number = args.num_epoch_checkpoints or args.num_update_checkpoints
    try:
        paths = args.inputs
        if by_number:
            by_updates = args.num_update_checkpoints is not None
            paths = last_checkpoints(
                args.inputs[0], by_number, by_updates, args.checkpoint_upper_bound
            )
        elif args.num_best_checkpoints:
            maximize = maximizes(args.inputs[0])
            paths = best_checkpoints(args.inputs, args.num_best_checkpoints, maximize)
            order = "highest" if maximize else "lowest"
            option = "with" if maximize else "without"
            print(
                f"the best are those with the {order} metric, since {paths[0].name} was trained "
                f"{option} --maximize-best-checkpoint-metric"
            )
        print("averaging", *paths, sep="\n  ")
        averaged = average_checkpoints(paths)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    try:
        with whole_or_not_at_all(args.output, args.overwrite) as part:
            torch.save(averaged, part)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: {args.output} cannot be written: {error}") from None
    print("written to", args.output)


if __name__ == "__main__":
    main()
