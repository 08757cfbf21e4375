"""Experiments with fairseq: masked language models and translation."""

import dataclasses
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from experiment import (
    ROOT,
    WEIGHTS,
    Experiment,
    ExperimentError,
    Options,
    Result,
    python,
    set_start,
    sets_start,
)

# fairseq never stops its thread that reads ahead, and the interpreter may crash over it at the end.
NO_THREAD = "--num-workers 0 --data-buffer-size 0".split()
UNTRAINED = "--max-update 1 --lr 1e-30 --disable-validation".split()
TESTS = ("test_2016_flickr", "test_2017_flickr")  # of Multi30k


@dataclass
class FairseqExperiment(Experiment):
    """A training by `fairseq-train` that begins with a plain checkpoint in all settings.

    Attributes:
        plain_arch: fairseq's architecture of that checkpoint.
        arch: ours.
        recipe: the other arguments of `fairseq-train`.
        updates: how many.
        every: updates between two validations.
    """

    plain_arch: str
    arch: str
    recipe: str
    updates: int
    every: int

    def data_bin(self, work: Path) -> Path:
        """The folder with the binarised data."""
        raise NotImplementedError

    def shortened(self) -> Experiment:
        return dataclasses.replace(self, updates=100, every=100, scores=self.scores[:1])

    def train(self, options: Options, seed: int, work: Path, run: Path) -> Result:
        fairseq_train = ["-m", "fairseq_cli.train", self.data_bin(work)]
        fairseq_train += ["--user-dir", ROOT / "ea_fairseq", "--seed", seed, *self.recipe.split()]
        fairseq_train += ["--no-epoch-checkpoints", *NO_THREAD]
        plain = ["--arch", self.plain_arch, "--save-dir", run / "plain"]
        python([*fairseq_train, *plain, *UNTRAINED], run / "plain.log")
        given = ["--arch", self.arch]
        for name, value in options.items():
            given += [] if name == "start" else as_argument(name, value)
        given += ["--finetune-from-model", run / "plain" / WEIGHTS]
        if sets_start(options):
            random = [*given, "--save-dir", run / "start"]
            python([*fairseq_train, *random, *UNTRAINED], run / "start.log")
            given[-1] = run / "start" / WEIGHTS
            write_start(given[-1], options)
        given += ["--save-dir", run]
        given += ["--max-update", self.updates, "--validate-interval-updates", self.every]
        given += "--log-format json --log-interval 100".split()
        log = python([*fairseq_train, *given], run / "train.log")
        curve = [
            (int(valid["valid_num_updates"]), float(valid["valid_loss"]))
            for valid in map(json.loads, re.findall(r"\| valid \| (\{.*\})", log))
        ]
        (seconds,) = re.findall(r"done training in ([\d.]+) seconds", log)
        scores = {self.scores[0]: curve[-1][1], **self.evaluate(seed, work, run)}
        return Result(scores, curve, float(seconds))

    def evaluate(self, seed: int, work: Path, run: Path) -> Dict[str, float]:
        """The scores other than the validation loss."""
        return {}


@dataclass
class MaskedLM(FairseqExperiment):
    """Masked language modelling, then fine-tuning.

    Attributes:
        tasks: of GLUE, whose training sentences are the text, and on which the model is fine-tuned.
            Without any, the text is Multi30k's English side.
    """

    tasks: Tuple[str, ...] = ()

    def data_bin(self, work: Path) -> Path:
        return work / self.name

    def prepare(self, data: Path, work: Path) -> None:
        script, text = ROOT / "examples/glue/prepare.py", self.data_bin(work)
        if not text.exists():
            if self.tasks:
                source = ["--raw", data / "glue", "--tasks", *self.tasks]
            else:
                files = (data / "multi30k" / f"{name}.en" for name in ("train", "val"))
                train, valid = (unpack(file, work) for file in files)
                source = ["--text", train, "--valid", valid]
            source += ["--vocabulary", 4000, "--out", text, "--workers", 1]
            python([script, "text", *source], work / f"{self.name}.log")
        if self.tasks and not self.task_data(work).exists():
            source = ["--raw", data / "glue", "--tasks", *self.tasks, "--bpe", text / "bpe"]
            source += ["--out", self.task_data(work), "--workers", 1]
            python([script, "tasks", *source], work / f"{self.name}-tasks.log")

    def task_data(self, work: Path) -> Path:
        """The folder with a folder for each task."""
        return work / f"{self.name}-tasks"

    def evaluate(self, seed: int, work: Path, run: Path) -> Dict[str, float]:
        found = {}
        for name, task in zip(self.scores[1:], self.tasks, strict=False):
            data, save_dir = self.task_data(work) / task, run / task
            given = [ROOT / "examples/glue/finetune.py", task, "--data", data, "--seeds", seed]
            given += ["--checkpoint", run / WEIGHTS, "--arch", self.arch]
            given += [*FINE_TUNING.split(), *SMALL_MODEL.split(), *NO_THREAD]
            given += ["--save-dir", save_dir]
            python(given, run / f"{task}.log")
            given = [ROOT / "examples/glue/evaluate.py", task, "--data", data]
            given += ["--checkpoint", save_dir / f"seed{seed}" / WEIGHTS]
            log = python(given, run / f"{task}-score.log")
            found[name] = float(re.findall(rf"^{task} valid   \w+ ([-\d.]+)$", log, re.M)[0])
        return found


@dataclass
class Translation(FairseqExperiment):
    """Multi30k, German to English, scored by sacreBLEU, beam 5, ignoring case."""

    def data_bin(self, work: Path) -> Path:
        return work / "multi30k" / "data-bin"

    def prepare(self, data: Path, work: Path) -> None:
        if self.data_bin(work).exists():
            return
        source = ["multi30k", "--raw", data / "multi30k", "--tests", ",".join(TESTS)]
        source += ["--out", work / "multi30k", "--workers", 1]
        python([ROOT / "examples/translation/prepare.py", *source], work / "multi30k.log")

    def evaluate(self, seed: int, work: Path, run: Path) -> Dict[str, float]:
        return {
            score: self.bleu("test" if index == 0 else f"test{index}", work, run)
            for index, score in enumerate(self.scores[1:])
        }

    def bleu(self, subset: str, work: Path, run: Path) -> float:
        """sacreBLEU of one test set."""
        from sacrebleu import corpus_bleu

        given = ["-m", "fairseq_cli.generate", self.data_bin(work), "--gen-subset", subset]
        given += ["--user-dir", ROOT / "ea_fairseq", "--path", run / WEIGHTS, "--cpu"]
        given += "--batch-size 64 --required-batch-size-multiple 1 --beam 5 --remove-bpe".split()
        given += "--source-lang de --target-lang en --tokenizer moses".split()
        log = python(given, run / f"{subset}.log")
        lines = dict(re.findall(r"^D-(\d+)\t[^\t]*\t(.*)$", log, flags=re.MULTILINE))
        translations = [lines[str(number)] for number in range(len(lines))]
        references = (work / "multi30k" / "raw" / f"{subset}.en").read_text().splitlines()
        return corpus_bleu(translations, [references], lowercase=True).score


def as_argument(name: str, value: object) -> List[str]:
    """An option of the evolving attention on fairseq's command line."""
    flag = f"--ea-{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def write_start(path: Path, options: Options) -> None:
    """Initialises each convolution in a checkpoint as `start` says."""
    from fairseq.checkpoint_utils import load_model_ensemble

    from ea_fairseq.average_checkpoints import load

    (model,), _ = load_model_ensemble([str(path)])
    set_start(model, options)
    torch.save({**load(path), "model": model.state_dict()}, path)


def unpack(path: Path, folder: Path) -> Path:
    """Copies a text file, which may be gzipped, and returns the copy."""
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise ExperimentError(f"--data: there is neither {path} nor {packed.name}")
    content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    (folder / path.name).write_bytes(content)
    return folder / path.name


SMALL_MODEL = """--encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --clip-norm 1.0 --cpu"""

MASKED_LM = f"""{SMALL_MODEL} --task masked_lm --criterion masked_lm
    --sample-break-mode complete_doc --tokens-per-sample 128
    --required-batch-size-multiple 1 --skip-invalid-size-inputs-valid-test
    --optimizer adam --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.01
    --lr-scheduler polynomial_decay --lr 2e-3"""

FINE_TUNING = "--max-positions 128 --epochs 6 --lr 3e-4 --batch-size 32"

TRANSLATION = """--encoder-layers 6 --encoder-embed-dim 160 --encoder-ffn-embed-dim 160
    --encoder-attention-heads 4 --decoder-layers 6 --decoder-embed-dim 160
    --decoder-ffn-embed-dim 160 --decoder-attention-heads 4 --share-all-embeddings
    --optimizer adam --adam-betas (0.9,0.98) --lr 2e-3 --lr-scheduler inverse_sqrt
    --warmup-updates 800 --dropout 0.1
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --cpu"""
