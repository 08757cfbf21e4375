#!/usr/bin/env python3
"""Fine-tune on one GLUE task with fairseq-train, a seed at a time, and score the best checkpoints.

    python examples/glue/finetune.py CoLA --data data/glue/CoLA --checkpoint pretrained.pt \\
        --arch ea_roberta_base --seeds 1 2 3 --save-dir checkpoints/CoLA [fairseq-train's options]

Learning rate, batch size, 10 epochs and 6 % warm-up are those of fairseq's recipe for RoBERTa; any
option of fairseq-train given besides comes last and so wins. An interrupted run goes on where it
was; a finished seed is only scored again. Without --checkpoint it trains from scratch.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from evaluate import USER_DIR, predict
from fairseq.data import indexed_dataset
from glue import TASKS, DataError, Task, score

# What fairseq's sentence_prediction reports to choose the best checkpoint by.
BEST = {
    "accuracy": ("accuracy", []),
    "mcc": ("mcc", ["--report-mcc"]),
    "f1": ("acc_and_f1", ["--report-acc-and-f1"]),
    "pearson": ("pearson_and_spearman", ["--report-pearson-and-spearman"]),
}


def train_command(args: argparse.Namespace, task: Task, save_dir: Path, seed: int) -> list[str]:
    """The fairseq-train command of one seed."""
    examples = len(indexed_dataset.MMapIndexedDataset(str(args.data / "input0" / "train")))
    batch_size = args.batch_size or task.batch_size
    updates = -(-examples // batch_size) * args.epochs
    best, report = BEST[task.metrics[0]]
    options = f"""
        --user-dir {shlex.quote(str(USER_DIR))} --arch {args.arch}
        --task sentence_prediction --criterion sentence_prediction
        --num-classes {len(task.labels) or 1} {"--regression-target" if task.is_regression else ""}
        --init-token 0 --separator-token 2 --shorten-method truncate
        --best-checkpoint-metric {best} --maximize-best-checkpoint-metric
        --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.1
        --lr-scheduler polynomial_decay --lr {args.lr or task.lr}
        --warmup-updates {updates * 6 // 100} --total-num-update {updates}
        --max-epoch {args.epochs} --max-update {updates}
        --batch-size {batch_size} --required-batch-size-multiple 1
        --no-epoch-checkpoints --find-unused-parameters --seed {seed}
    """
    command = [sys.executable, "-m", "fairseq_cli.train", str(args.data), *shlex.split(options)]
    command += [*report, "--save-dir", str(save_dir)]
    if args.checkpoint:
        command += ["--finetune-from-model", str(args.checkpoint)]
    return command + args.options


def finetune(args: argparse.Namespace) -> dict[str, list[float]]:
    """The task's metrics on the validation set, one value a seed. DataError if training fails."""
    task = TASKS[args.task]
    results: dict[str, list[float]] = {name: [] for name in task.metrics}
    for seed in args.seeds:
        save_dir = args.save_dir / f"seed{seed}"
        finished = save_dir / "finished"
        command = train_command(args, task, save_dir, seed)
        save_dir.mkdir(parents=True, exist_ok=True)
        if not finished.exists():
            with (save_dir / "train.log").open("a", encoding="utf-8") as log:
                print(shlex.join(command), file=log, flush=True)
                failed = subprocess.run(command, stdout=log, stderr=log).returncode
            if failed:
                end = (save_dir / "train.log").read_text(encoding="utf-8", errors="replace")
                raise DataError(
                    f"fairseq-train failed; the end of {save_dir / 'train.log'}:\n{end[-2000:]}"
                )
            finished.touch()
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
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--lr", type=float, help="default: fairseq's for the task")
    parser.add_argument("--batch-size", type=int, help="default: fairseq's for the task")
    args, args.options = parser.parse_known_args(argv)
    for name in ("data", "checkpoint"):
        path = getattr(args, name)
        if path and not path.exists():
            parser.error(f"--{name}: no {path}")
    try:
        results = finetune(args)
    except DataError as error:
        sys.exit(f"finetune.py: error: {error}")
    for name, values in results.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{args.task}   {name} {statistics.mean(values):.1f}{spread} ({len(values)} seeds)")


if __name__ == "__main__":
    main()
