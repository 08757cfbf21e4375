#!/usr/bin/env python3
"""Fine-tune on one GLUE task with fairseq-train, a seed at a time, and score the best checkpoints.

    python examples/glue/finetune.py CoLA --data data/glue/CoLA --checkpoint pretrained.pt \\
        --arch ea_roberta_base --seeds 1 2 3 --save-dir checkpoints/CoLA [fairseq-train's options]

Learning rate, batch size and 10 epochs are those of fairseq's recipe for RoBERTa, and so is a
warm-up of 6 %; the best checkpoint is chosen by the task's official metric, or for scores by the
loss. All other options are passed on to fairseq-train; the --ea-* options that are not given are
those of the checkpoint. A rerun continues an interrupted training and only scores a finished one
again. Without --checkpoint it trains from scratch.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from evaluate import USER_DIR, predict
from fairseq.data import indexed_dataset
from glue import TASKS, Task, check_prepared, mean_of, score

from ea_fairseq.average_checkpoints import load
from ea_fairseq.checkpoints import options_of
from ea_fairseq.models.options import evolution_of
from evolving_attention.commands import DataError, alone_in, positive

HEADER = "# finetune.py runs the last of these commands in this folder\n"  # marks it as ours
# What fairseq must be told to report a metric.
REPORT = {
    "mcc": ["--report-mcc"],
    "acc_and_f1": ["--report-acc-and-f1"],
    "loss": ["--report-pearson-and-spearman", "--regression-target"],
    "accuracy": [],
}


def train_command(args: argparse.Namespace, task: Task, save_dir: Path, seed: int) -> list[str]:
    """The fairseq-train command of one seed."""
    batch_size = task.batch_size if args.batch_size is None else args.batch_size
    lr = task.lr if args.lr is None else args.lr
    batches = -(-len(lengths_of(task, args.data)) // batch_size)
    updates = -(-batches // args.update_freq) * args.epochs
    options = f"""
        --user-dir {shlex.quote(str(USER_DIR))} --arch {args.arch}
        --task sentence_prediction --criterion sentence_prediction
        --num-classes {len(task.labels) or 1} {" ".join(REPORT[task.best])}
        --init-token 0 --separator-token 2 --max-positions {args.max_positions}
        --shorten-method truncate --best-checkpoint-metric {task.best}
        --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.1
        --lr-scheduler polynomial_decay --lr {lr}
        --warmup-updates {updates * 6 // 100} --total-num-update {updates}
        --max-epoch {args.epochs} --max-update {updates}
        --batch-size {batch_size} --update-freq {args.update_freq}
        --required-batch-size-multiple 1 --distributed-world-size 1
        --no-epoch-checkpoints --find-unused-parameters --seed {seed}
    """
    command = [sys.executable, "-m", "fairseq_cli.train", str(args.data), *shlex.split(options)]
    command += ["--save-dir", str(save_dir)]
    if task.best != "loss":
        command.append("--maximize-best-checkpoint-metric")
    if args.checkpoint:
        command += ["--finetune-from-model", str(args.checkpoint)]
    return command + args.options


def inherited_options(args: argparse.Namespace) -> list[str]:
    """The options of the evolving attention that only the checkpoint has, not the command line."""
    if not args.checkpoint or not args.arch.startswith("ea_"):
        return []
    try:
        options = options_of(load(args.checkpoint), "model")
    except ValueError as error:
        raise DataError(f"--checkpoint: {error}") from None
    if not any(name.startswith("ea_") for name in options):
        return []  # a plain model
    given = {option.partition("=")[0] for option in args.options}
    inherited = []
    for name, value in evolution_of(options).items():
        flag = f"--{name.replace('_', '-')}"
        if flag not in given and value is not False:
            inherited += [flag] if value is True else [flag, str(value)]
    return inherited


def lengths_of(task: Task, data: Path) -> np.ndarray:
    """Tokens of each training example, as the model gets them: <s> a </s> </s> b </s>."""
    lengths = 1
    for index in range(len(task.inputs)):
        path = data / f"input{index}" / "train"
        if not indexed_dataset.MMapIndexedDataset.exists(str(path)):
            raise DataError(f"there is no {path}.bin and .idx; prepare.py tasks writes them")
        dataset = indexed_dataset.MMapIndexedDataset(str(path))
        lengths = lengths + dataset.sizes + (index > 0)
    return lengths


def train(args: argparse.Namespace, task: Task, save_dir: Path, seed: int) -> None:
    """Trains one seed, or what is missing of it. DataError if it fails."""
    command = train_command(args, task, save_dir, seed)
    given, finished = save_dir / "command.txt", save_dir / "finished"
    claim(save_dir, given, shlex.join(command))
    with alone_in(save_dir):
        if finished.exists():
            return
        log = save_dir / "train.log"
        print(f"{task.name}   seed {seed}   trains, see {log}", flush=True)
        with log.open("a", encoding="utf-8") as file:
            failed = subprocess.run(command, stdout=file, stderr=file).returncode
        if failed or not (save_dir / "checkpoint_best.pt").exists():
            end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise DataError(f"fairseq-train failed; the end of {log}:\n{end}")
        finished.touch()


def claim(save_dir: Path, given: Path, command: str) -> None:
    """Records the command in a new folder, or accepts a folder where it was the last one recorded.
    DataError if the folder belongs to a run with other options, or not to this script."""
    save_dir.mkdir(parents=True, exist_ok=True)
    text = given.read_text(encoding="utf-8") if given.exists() else ""
    if f"\n{text}".endswith(f"\n{command}\n"):
        return
    ours = text.startswith(HEADER)
    if any(save_dir.glob("checkpoint*.pt")) or (not ours and any(save_dir.iterdir())):
        see = " (see command.txt there)" if text else ""
        raise DataError(
            f"{save_dir} is not empty and was not made with these options{see}; move it, or choose "
            "another --save-dir"
        )
    with given.open("a", encoding="utf-8") as file:
        file.write(f"{command}\n" if ours else f"{HEADER}{command}\n")


def finetune(args: argparse.Namespace) -> dict[str, list[float]]:
    """The task's metrics on the validation set, one value a seed. DataError if training fails."""
    task = TASKS[args.task]
    check_prepared(task, args.data)
    lengths = lengths_of(task, args.data)
    if cut := int((lengths > args.max_positions).sum()):
        print(
            f"{cut} of {len(lengths)} training examples are longer than --max-positions "
            f"{args.max_positions}: cut off there"
        )
    if inherited := inherited_options(args):
        print(f"as in {args.checkpoint}: {' '.join(inherited)}", flush=True)
        args.options += inherited
    results: dict[str, list[float]] = {name: [] for name in task.metrics}
    for seed in args.seeds:
        save_dir = args.save_dir / f"seed{seed}"
        train(args, task, save_dir, seed)
        predictions, targets = predict(task, save_dir / "checkpoint_best.pt", args.data, "valid")
        scores = score(task, targets, predictions)
        text = "   ".join(f"{name} {value:.1f}" for name, value in scores.items())
        print(f"{task.name}   seed {seed}   {text}", flush=True)
        for name, value in scores.items():
            results[name].append(value)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py tasks wrote")
    parser.add_argument("--checkpoint", type=Path, help="the pre-trained model, plain or evolving")
    parser.add_argument("--arch", default="ea_roberta_base", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=positive, default=10, help="default: %(default)s")
    parser.add_argument("--lr", type=float, help="default: fairseq's for the task")
    parser.add_argument("--batch-size", type=positive, help="default: fairseq's for the task")
    parser.add_argument(
        "--update-freq", type=positive, default=1, metavar="N", help="batches an update; default: 1"
    )
    parser.add_argument(
        "--max-positions",
        type=positive,
        default=512,
        metavar="N",
        help="tokens the pre-trained model takes (its --tokens-per-sample); default: 512",
    )
    args, args.options = parser.parse_known_args(argv)
    if args.lr is not None and not args.lr > 0:
        parser.error(f"--lr must be more than 0, got {args.lr}")
    for name in ("data", "checkpoint"):
        path = getattr(args, name)
        if path and not path.exists():
            parser.error(f"--{name}: no {path}")
    try:
        results = finetune(args)
    except (DataError, OSError) as error:
        sys.exit(f"finetune.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: interrupted; the same command continues the run")
    for name, values in results.items():
        print(f"{args.task}   {name} {mean_of(values)}")


if __name__ == "__main__":
    main()
