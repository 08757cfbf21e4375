#!/usr/bin/env python3
"""Score a fine-tuned model on a GLUE task, or write its predictions for the GLUE server.

    python examples/glue/evaluate.py CoLA --data data/glue/CoLA --checkpoint checkpoint_best.pt
    python examples/glue/evaluate.py CoLA --data data/glue/CoLA --checkpoint checkpoint_best.pt \\
        --split test --predictions CoLA.tsv
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from glue import TASKS, Task, check_prepared, score, write_predictions
from tqdm import tqdm

from evolving_attention.commands import (
    DataError,
    add_overwrite,
    check_output,
    whole_or_not_at_all,
)

USER_DIR = Path(__file__).resolve().parents[2] / "ea_fairseq"


@torch.no_grad()
def predict(task: Task, checkpoint: Path, data: Path, split: str) -> tuple[list, list | None]:
    """The model's predictions for a split that prepare.py wrote, in the order of its file.

    Returns class indices, or scores from 0 to 5, and the targets, which are None in a test set.
    DataError if the data or the checkpoint are missing or belong to another task.
    """
    check_prepared(task, data)
    for path in (checkpoint, data / "input0" / f"{split}.idx"):
        if not path.is_file():
            raise DataError(f"no file {path}")
    utils.import_user_module(Namespace(user_dir=str(USER_DIR)))
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), {"data": str(data)})
    except Exception as error:  # pickle, torch and fairseq may raise anything
        raise DataError(f"{checkpoint} is no checkpoint of fairseq: {error!r}") from error
    check_checkpoint(task, state, checkpoint, data)
    (model,), cfg, fairseq_task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], state=state
    )
    fairseq_task.load_dataset(split)
    dataset = fairseq_task.dataset(split)
    longest = max(map(dataset.num_tokens, range(len(dataset))))
    if longest > model.max_positions():
        raise DataError(
            f"an example of {split} has {longest} tokens, but {checkpoint} takes at most "
            f"{model.max_positions()}: fine-tune with --shorten-method truncate"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    predictions, targets = [None] * len(dataset), [None] * len(dataset)
    order = dataset.ordered_indices()
    batches = data_utils.batch_by_size(order, dataset.num_tokens, max_sentences=32)
    for indices in tqdm(batches, f"{task.name} {split}", disable=None):
        sample = dataset.collater([dataset[index] for index in indices])
        logits, _ = model(
            sample["net_input"]["src_tokens"].to(device),
            features_only=True,
            classification_head_name=cfg.task.classification_head_name,
        )
        found = 5 * logits.float().view(-1) if task.is_regression else logits.argmax(dim=1)
        found = found.tolist()
        for place, index in enumerate(sample["id"].tolist()):
            predictions[index] = found[place]
            if "target" in sample:
                target = sample["target"].view(-1)[place].item()
                targets[index] = 5 * target if task.is_regression else target
    return predictions, None if None in targets else targets


def check_checkpoint(task: Task, state: dict, checkpoint: Path, data: Path) -> None:
    """DataError unless the checkpoint was fine-tuned on this task with the same dictionary."""
    cfg = state["cfg"]
    if cfg is None or cfg.task._name != "sentence_prediction":
        raise DataError(f"{checkpoint} was not fine-tuned: its task is not sentence_prediction")
    is_regression = cfg.criterion.regression_target
    if (cfg.task.num_classes, is_regression) != (len(task.labels) or 1, task.is_regression):
        kind = "a score" if is_regression else f"{cfg.task.num_classes} classes"
        raise DataError(f"{checkpoint} was fine-tuned for {kind}, not on {task.name}")
    symbols = len(SentencePredictionTask.load_dictionary(str(data / "input0" / "dict.txt")))
    known = len(state["model"]["encoder.sentence_encoder.embed_tokens.weight"])
    if symbols != known:
        raise DataError(
            f"{checkpoint} knows {known} tokens, the dictionary of --data {data} has {symbols}: "
            "they were prepared with different BPEs"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py tasks wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a fine-tuned model")
    parser.add_argument("--split", default="valid", help="valid, valid1, test or test1")
    parser.add_argument("--predictions", type=Path, help="write the predictions there")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    try:
        if args.predictions:
            check_output(args.predictions, args.overwrite)  # before anything takes time
        predictions, targets = predict(task, args.checkpoint, args.data, args.split)
        if args.predictions:
            with whole_or_not_at_all(args.predictions, args.overwrite) as part:
                write_predictions(task, predictions, part)
        if targets is not None:
            for name, value in score(task, targets, predictions).items():
                print(f"{task.name} {args.split}   {name} {value:.1f}")
        elif not args.predictions:
            raise DataError(f"{args.split} of {task.name} has no labels: give --predictions FILE")
    except (DataError, OSError) as error:
        sys.exit(f"evaluate.py: error: {error}")


if __name__ == "__main__":
    main()
