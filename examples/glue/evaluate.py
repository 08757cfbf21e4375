#!/usr/bin/env python3
"""Score a fine-tuned model on a GLUE task, or write its predictions for the GLUE server.

    python examples/glue/evaluate.py CoLA --data data/glue/CoLA --checkpoint checkpoint_best.pt
    python examples/glue/evaluate.py CoLA --data data/glue/CoLA --checkpoint checkpoint_best.pt \\
        --split test --predictions CoLA.tsv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils
from glue import TASKS, DataError, Task, score
from tqdm import tqdm

USER_DIR = Path(__file__).resolve().parents[2] / "ea_fairseq"


@torch.no_grad()
def predict(task: Task, checkpoint: Path, data: Path, split: str) -> tuple[list, list | None]:
    """The model's predictions for a split that prepare.py wrote, in the order of its file.

    Returns classes by their index, or scores from 0 to 5; and the targets, None in a test set.
    DataError if the data or the checkpoint are not there or of another task.
    """
    for path in (checkpoint, data / "input0" / f"{split}.idx"):
        if not path.exists():
            raise DataError(f"no {path}")
    utils.import_user_module(argparse.Namespace(user_dir=str(USER_DIR)))
    (model,), cfg, fairseq_task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(data)}
    )
    head = getattr(cfg.task, "classification_head_name", None)
    if head is None or fairseq_task.cfg.num_classes != (len(task.labels) or 1):
        raise DataError(f"{checkpoint} was not fine-tuned on {task.name}, or on a task like it")
    fairseq_task.load_dataset(split)
    dataset = fairseq_task.dataset(split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    predictions, targets = [None] * len(dataset), [None] * len(dataset)
    batches = data_utils.batch_by_size(
        dataset.ordered_indices(), dataset.num_tokens, max_sentences=32
    )
    for indices in tqdm(batches, f"{task.name} {split}", disable=None):
        sample = dataset.collater([dataset[index] for index in indices])
        tokens = sample["net_input"]["src_tokens"].to(device)
        logits, _ = model(tokens, features_only=True, classification_head_name=head)
        if task.is_regression:
            found = (5 * logits.float().view(-1)).clamp(0, 5)
        else:
            found = logits.argmax(dim=1)
        found = found.tolist()
        for place, index in enumerate(sample["id"].tolist()):
            predictions[index] = found[place]
            if "target" in sample:
                target = sample["target"].view(-1)[place].item()
                targets[index] = 5 * target if task.is_regression else target
    return predictions, None if None in targets else targets


def write_predictions(task: Task, predictions: list, path: Path) -> None:
    """The file the GLUE server takes: a header, then index and label of each line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("index\tprediction\n")
        for index, prediction in enumerate(predictions):
            label = f"{prediction:.3f}" if task.is_regression else task.labels[prediction]
            file.write(f"{index}\t{label}\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py tasks wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a fine-tuned model")
    parser.add_argument("--split", default="valid", help="valid, valid1, test or test1")
    parser.add_argument("--predictions", type=Path, help="write the predictions there")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    try:
        predictions, targets = predict(task, args.checkpoint, args.data, args.split)
        if args.predictions:
            write_predictions(task, predictions, args.predictions)
        if targets is not None:
            for name, value in score(task, targets, predictions).items():
                print(f"{task.name} {args.split}   {name} {value:.1f}")
        elif not args.predictions:
            raise DataError(f"{args.split} of {task.name} has no labels: give --predictions FILE")
    except DataError as error:
        sys.exit(f"evaluate.py: error: {error}")


if __name__ == "__main__":
    main()
