#!/usr/bin/env python3
"""Fine-tune on one GLUE task with transformers' Trainer, a seed at a time, and score the results.

    python examples/glue/finetune_transformers.py CoLA --raw glue_data --model bert-base-uncased \\
        --save-dir checkpoints/CoLA --seeds 1 2 3

--model is a BERT, RoBERTa or T5: a name on the Hugging Face hub or a folder, plain or evolving. The
--ea-* options that are not given are those of an evolving model, and for a plain one 0.1 and 0.1;
--plain trains the baseline. The best checkpoint is chosen by the task's official metric, or by the
loss for STS-B, and is in SAVE_DIR/seed1/best afterwards. A rerun continues an interrupted training
and only shows the scores of a finished one again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from glue import TASKS, Example, Task, find_files, mean_of, read, score, write_predictions
from transformers.trainer_utils import get_last_checkpoint

import ea_transformers
from evolving_attention.commands import DataError, alone_in, positive, whole_or_not_at_all

CLASSES = {
    "bert": ea_transformers.EABertForSequenceClassification,
    "roberta": ea_transformers.EARobertaForSequenceClassification,
    "t5": ea_transformers.EAT5ForSequenceClassification,
}
MAX_LENGTH = 128
EVOLUTION = ("ea_alpha", "ea_beta", "ea_kernel_size", "ea_learnable")


def encode(task: Task, examples: list[Example], tokenizer: Any, max_length: int) -> list[dict]:
    """Token ids and label of each example; scores are scaled to [0, 1]."""
    columns = zip(*(example.inputs for example in examples), strict=True)
    tokens = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    rows = [{name: tokens[name][i] for name in tokens} for i in range(len(examples))]
    for row, example in zip(rows, examples, strict=True):
        if example.label is not None:
            is_score = task.is_regression
            row["labels"] = (
                float(example.label) / 5 if is_score else task.labels.index(example.label)
            )
    return rows


def build(task: Task, model: str, plain: bool = False, **evolution: Any) -> torch.nn.Module:
    """The pre-trained model with a head for the task.

    The head is new, unless the model has one for as many classes.

    Raises:
        DataError: there is no such model, or it has no evolving counterpart, or it is an evolving
            one and should be plain.
        ValueError: an option of the evolution is wrong or does not fit the model.
    """
    config = config_of(model)
    host = config.model_type.removeprefix("ea_")
    options: dict[str, Any] = {"num_labels": len(task.labels) or 1}
    options["ignore_mismatched_sizes"] = config.num_labels != options["num_labels"]
    options["problem_type"] = "regression" if task.is_regression else "single_label_classification"
    if not task.is_regression:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {label: i for i, label in enumerate(task.labels)}
    if plain:
        if host != config.model_type:
            raise DataError(f"--plain needs a plain model, but the maps of --model {model} evolve")
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(model, **options)
    if host not in CLASSES:
        raise DataError(
            f"--model {model} holds a model of type {host}; it must be one of {', '.join(CLASSES)}"
        )
    return CLASSES[host].from_pretrained(model, **options, **evolution)


def config_of(model: str) -> Any:
    """The configuration of --model. DataError if there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        found = "no folder of this name" if not Path(model).is_dir() else "a folder without a model"
        raise DataError(f"--model {model}: {found}; {error}") from None


def make_trainer(
    task: Task,
    model: torch.nn.Module,
    tokenizer: Any,
    train: list[dict],
    valid: list[dict],
    ea_lr: float | None = None,
    **arguments: Any,
) -> transformers.Trainer:
    """A Trainer that reports the task's metrics in per cent.

    Args:
        ea_lr: learning rate of learned alpha and beta; None for that of the other weights.
        arguments: of transformers' TrainingArguments.
    """

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        return scores_of(task, prediction.predictions, prediction.label_ids)

    options = transformers.TrainingArguments(
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="linear",
        warmup_steps=0.06,  # a share of all steps
        weight_decay=0.01,
        eval_strategy="epoch",
        **arguments,
    )
    trainer = transformers.Trainer(
        model,
        options,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    trainer.create_optimizer()
    if ea_lr is not None:
        set_mixing_lr(trainer, ea_lr)
    return trainer


def set_mixing_lr(trainer: transformers.Trainer, lr: float) -> None:
    """Gives alpha and beta a learning rate of their own, and no weight decay."""
    mixing = [  # in their order, by which a resumed training finds their state
        parameter
        for name, parameter in trainer.model.named_parameters()
        if ".evolution." in name and name.endswith((".alpha", ".beta"))
    ]
    for group in trainer.optimizer.param_groups:
        group["params"] = [x for x in group["params"] if all(x is not y for y in mixing)]
    trainer.optimizer.add_param_group({"params": mixing, "lr": lr, "weight_decay": 0.0})


def predictions_of(task: Task, logits: Any) -> list:
    """Class indices, or scores from 0 to 5."""
    logits = logits[0] if isinstance(logits, tuple) else logits  # T5 returns its encoder's output
    found = 5 * logits.reshape(-1) if task.is_regression else np.argmax(logits, axis=1)
    return found.tolist()


def scores_of(task: Task, logits: Any, labels: np.ndarray) -> dict[str, float]:
    """The official metrics; 0 for a correlation that is no number, as for equal predictions."""
    targets = (5 * labels if task.is_regression else labels).tolist()
    scores = score(task, targets, predictions_of(task, logits))
    return {name: float(np.nan_to_num(value)) for name, value in scores.items()}


def train(args: argparse.Namespace, task: Task, seed: int) -> dict[str, dict[str, float]]:
    """The scores of one seed's best checkpoint by split; does what is missing of the work."""
    folder = args.save_dir / f"seed{seed}"
    given = {name: str(value) for name, value in vars(args).items() if name not in UNUSED}
    for name in PATHS:
        if Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    claim(folder, given)
    results = folder / "scores.json"
    with alone_in(folder):
        tests = [x for x, _ in task.files if x.startswith("test") and args.predict]
        if not results.exists() or not all((folder / f"{x}.tsv").exists() for x in tests):
            rows = read_splits(args, task)
            if not (folder / "best").exists():
                train_best(args, task, seed, folder, rows)
            found = evaluate_best(args, task, folder, rows)
            with whole_or_not_at_all(results, overwrite=True) as part:
                part.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(results.read_text())


UNUSED = ("save_dir", "seeds", "predict")  # options that do not change a training
PATHS = ("raw", "model")  # options that may be paths


def read_splits(args: argparse.Namespace, task: Task) -> dict[str, list[dict]]:
    """The encoded examples of each split that is needed."""
    files = find_files(task, args.raw)
    positions = positions_of(config_of(args.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    most = min(tokenizer.model_max_length, positions)
    if args.max_length is not None and args.max_length > most:
        raise DataError(
            f"--max-length must be at most {most} for {args.model}, got {args.max_length}"
        )
    length = args.max_length or min(MAX_LENGTH, most)
    return {
        split: encode(task, read(task, path, split, args.skip_bad_lines), tokenizer, length)
        for split, path in files.items()
        if not split.startswith("test") or args.predict
    }


def positions_of(config: Any) -> int:
    """How many tokens the model takes at most; a huge number if any number."""
    positions = getattr(config, "max_position_embeddings", sys.maxsize)
    # RoBERTa's positions begin after the index of the padding.
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def train_best(
    args: argparse.Namespace, task: Task, seed: int, folder: Path, rows: dict[str, list[dict]]
) -> None:
    """Trains, or goes on where it was interrupted; the best checkpoint goes to `folder`/best."""
    transformers.set_seed(seed)
    evolution = {name: getattr(args, name) for name in EVOLUTION if getattr(args, name) is not None}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    best = "loss" if task.best == "loss" else task.metrics[0]
    checkpoints = folder / "checkpoints"
    trainer = make_trainer(
        task,
        build(task, args.model, args.plain, **evolution),
        tokenizer,
        rows["train"],
        rows["valid"],
        args.ea_lr,
        output_dir=str(checkpoints),
        seed=seed,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{best}",
        greater_is_better=best != "loss",
        bf16=args.bf16,
    )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    with whole_or_not_at_all(folder / "best") as part:
        trainer.save_model(str(part))
        tokenizer.save_pretrained(part)


def evaluate_best(
    args: argparse.Namespace, task: Task, folder: Path, rows: dict[str, list[dict]]
) -> dict[str, dict[str, float]]:
    """Scores of the labelled splits; the predictions for the others go to files."""
    trainer = make_trainer(
        task,
        build(task, str(folder / "best"), args.plain),
        transformers.AutoTokenizer.from_pretrained(folder / "best"),
        rows["train"],
        rows["valid"],
        output_dir=str(folder / "checkpoints"),
        per_device_eval_batch_size=args.batch_size,
        bf16=args.bf16,
    )
    found = {}
    for split in rows.keys() - {"train"}:
        output = trainer.predict(rows[split])
        if output.label_ids is not None:
            found[split] = scores_of(task, output.predictions, output.label_ids)
        else:
            with whole_or_not_at_all(folder / f"{split}.tsv", overwrite=True) as part:
                write_predictions(task, predictions_of(task, output.predictions), part)
    return dict(sorted(found.items()))


def claim(folder: Path, options: dict[str, str]) -> None:
    """Records the options in a new folder, or in one without a checkpoint so far.
    DataError if the folder belongs to something else."""
    record = folder / "options.json"
    if not record.exists():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty, and this script did not write it")
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(options, indent=1) + "\n")
    try:
        before = json.loads(record.read_text())
    except ValueError:
        before = None
    if not isinstance(before, dict) or not {"task", "raw", "model"} <= before.keys():
        raise DataError(f"{record} is damaged, or this script did not write it; move {folder}")
    differing = sorted(name for name in options if before.get(name, "None") != options[name])
    started = (folder / "best").exists() or any(folder.glob("checkpoints/checkpoint-*"))
    if differing and not started:
        record.write_text(json.dumps(options, indent=1) + "\n")
    elif differing:
        name = differing[0]
        raise DataError(
            f"{folder} was trained with {name}={before.get(name)}, not {options[name]}; move it, "
            "or choose another --save-dir"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--raw", type=Path, required=True, help="official files, a folder a task")
    parser.add_argument("--model", required=True, help="name or folder of a BERT, RoBERTa or T5")
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--epochs", type=positive, default=3, help="default: 3")
    parser.add_argument("--lr", type=float, default=2e-5, help="default: 2e-5")
    parser.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    parser.add_argument(
        "--max-length",
        type=positive,
        help=f"tokens; default: {MAX_LENGTH}, or as many as the model takes",
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--plain", action="store_true", help="transformers' own model")
    parser.add_argument("--ea-alpha", type=float)
    parser.add_argument("--ea-beta", type=float)
    parser.add_argument("--ea-kernel-size", type=int)
    parser.add_argument("--ea-learnable", action="store_true", default=None)
    parser.add_argument("--ea-lr", type=float, help="of learned alpha and beta; default: --lr")
    parser.add_argument("--predict", action="store_true", help="write SPLIT.tsv for the test sets")
    parser.add_argument("--skip-bad-lines", action="store_true", help="older copies of QQP")
    args = parser.parse_args(argv)
    for name in ("lr", "ea_lr"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0, got {value}")
    if args.ea_lr is not None and not args.ea_learnable:
        parser.error("--ea-lr is the learning rate of learned weights: give --ea-learnable")
    if args.plain and any(getattr(args, name) is not None for name in EVOLUTION):
        parser.error("--plain trains transformers' own model, which has no --ea options")
    task = TASKS[args.task]
    try:
        found = []
        for seed in args.seeds:
            found.append(train(args, task, seed))
            for split, scores in found[-1].items():
                text = "   ".join(f"{name} {value:.1f}" for name, value in scores.items())
                print(f"{task.name} {split}   seed {seed}   {text}", flush=True)
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"finetune_transformers.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune_transformers.py: interrupted; the same command continues the run")
    for split in found[0]:
        for name in task.metrics:
            values = [scores[split][name] for scores in found]
            print(f"{task.name} {split}   {name} {mean_of(values)}")


if __name__ == "__main__":
    main()
