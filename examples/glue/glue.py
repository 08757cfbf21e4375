"""The nine GLUE tasks (Wang et al., 2019): their official files, labels and metrics."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from evolving_attention.commands import DataError, check_data_path, text_lines


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task, and of its folder in the official archive.
        inputs: the columns that hold the sentence, or the pair of sentences.
        label: the column of the label.
        labels: the labels, in the order of the model's classes; none if it is a score, 0 to 5.
        metrics: the official ones, of METRICS.
        best: fairseq's metric for choosing the best checkpoint.
        header: the columns of the labelled files, if their first line does not name them.
        files: the official files of each of fairseq's splits; where there are several names, the
            first file that exists is taken.
        lr, batch_size: of fairseq's fine-tuning recipe for RoBERTa.
    """

    name: str
    inputs: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    best: str = "accuracy"
    header: tuple[str, ...] = ()
    files: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("train", ("train.tsv",)),
        ("valid", ("dev.tsv",)),
        ("test", ("test.tsv",)),
    )
    lr: float = 1e-5
    batch_size: int = 32

    @property
    def is_regression(self) -> bool:
        return not self.labels


PAIR = ("sentence1", "sentence2")
INFERENCE = ("not_entailment", "entailment")

TASKS = {
    task.name: task
    for task in (
        Task(
            "CoLA",
            ("sentence",),
            metrics=("mcc",),
            best="mcc",
            header=("source", "label", "star", "sentence"),
            # The corpus' own release has GLUE's dev.tsv in two parts.
            files=(
                ("train", ("train.tsv", "in_domain_train.tsv")),
                ("valid", ("dev.tsv", "in_domain_dev.tsv")),
                ("valid1", ("out_of_domain_dev.tsv",)),
                ("test", ("test.tsv",)),
            ),
            batch_size=16,
        ),
        Task("SST-2", ("sentence",)),
        Task(
            "MRPC",
            ("#1 String", "#2 String"),
            label="Quality",
            metrics=("f1", "accuracy"),
            best="acc_and_f1",
            batch_size=16,
        ),
        Task(
            "STS-B",
            PAIR,
            label="score",
            labels=(),
            metrics=("pearson", "spearman"),
            best="loss",  # a correlation is no number while all predictions are alike
            lr=2e-5,
            batch_size=16,
        ),
        Task(
            "QQP",
            ("question1", "question2"),
            label="is_duplicate",
            metrics=("f1", "accuracy"),
            best="acc_and_f1",
        ),
        Task(
            "MNLI",
            PAIR,
            label="gold_label",
            labels=("contradiction", "neutral", "entailment"),
            files=(
                ("train", ("train.tsv",)),
                ("valid", ("dev_matched.tsv",)),
                ("valid1", ("dev_mismatched.tsv",)),
                ("test", ("test_matched.tsv",)),
                ("test1", ("test_mismatched.tsv",)),
            ),
        ),
        Task("QNLI", ("question", "sentence"), labels=INFERENCE),
        Task("RTE", PAIR, labels=INFERENCE, lr=2e-5, batch_size=16),
        Task("WNLI", PAIR, lr=2e-5, batch_size=16),
    )
}

METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "mcc": matthews_corrcoef,
    "pearson": lambda targets, predictions: pearsonr(targets, predictions)[0],
    "spearman": lambda targets, predictions: spearmanr(targets, predictions)[0],
}


def score(task: Task, targets: list, predictions: list) -> dict[str, float]:
    """The task's official metrics, in per cent; classes are given by their index."""
    return {name: 100 * float(METRICS[name](targets, predictions)) for name in task.metrics}


def mean_of(values: list[float]) -> str:
    """The mean and, for several seeds, the standard deviation."""
    spread = f" ± {stdev(values):.1f} ({len(values)} seeds)" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def write_predictions(task: Task, predictions: list, path: Path) -> None:
    """The file the GLUE server takes: a header, then index and label of each line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("index\tprediction\n")
        for index, prediction in enumerate(predictions):
            if task.is_regression:
                label = f"{min(max(prediction, 0), 5):.3f}"
            else:
                label = task.labels[prediction]
            file.write(f"{index}\t{label}\n")


@dataclass(frozen=True)
class Example:
    """One line: its sentence or sentences, and its label, which is None in a test set."""

    inputs: tuple[str, ...]
    label: str | None


def find_files(task: Task, raw: Path) -> dict[str, Path]:
    """The official files of the task's splits under `raw`; the test sets may be missing."""
    folder = raw / task.name
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; --raw is the folder that holds {task.name}")
    found = {}
    for split, names in task.files:
        paths = [folder / name for name in names if (folder / name).is_file()]
        if paths:
            found[split] = paths[0]
        elif split in ("train", "valid"):
            raise DataError(f"no {' or '.join(names)} in {folder}")
    return found


def read(task: Task, path: Path, split: str, skip_bad_lines: bool = False) -> list[Example]:
    """The examples of an official file. DataError, with the number of the line, if it is wrong.

    `skip_bad_lines` leaves out lines with a wrong number of columns, which older copies of QQP
    have, and says how many; never in a test set, whose predictions are numbered by its lines.
    """
    examples, skipped = [], 0
    is_test = split.startswith("test")
    wanted = task.inputs if is_test else (*task.inputs, task.label)
    lines = list(lines_of(path))
    if is_test or not task.header:
        columns = tuple(lines[0].split("\t")) if lines else ()
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise DataError(
                f"{path}, line 1: no column {', '.join(missing)}; {task.name} has a first line "
                f"that names {', '.join(wanted)}, this one is {columns}"
            )
        first = 2
    else:
        columns, first = task.header, 1
    for number, line in enumerate(lines[first - 1 :], first):
        fields = line.split("\t")
        if len(fields) != len(columns):
            if skip_bad_lines and not is_test:
                skipped += 1
                continue
            raise DataError(
                f"{path}, line {number}: {len(fields)} columns instead of {len(columns)} "
                f"({', '.join(columns)}), separated by tabs; --skip-bad-lines leaves such lines "
                "out of training and validation"
            )
        row = dict(zip(columns, fields, strict=True))
        if not is_test:
            check_label(task, row[task.label], f"{path}, line {number}")
        inputs = tuple(row[name] for name in task.inputs)
        examples.append(Example(inputs, None if is_test else row[task.label]))
    if skipped:
        print(f"{path}: {skipped} lines with a wrong number of columns left out")
    if not examples:
        raise DataError(f"{path}: no examples")
    return examples


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends. DataError if it is no text file."""
    try:
        with path.open("rb") as file:
            for line in text_lines(file, path):
                yield line.rstrip("\r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def check_label(task: Task, label: str, where: str) -> None:
    """DataError unless the label is one of the task's."""
    if not task.is_regression:
        if label not in task.labels:
            raise DataError(
                f"{where}: label {label!r}; those of {task.name} are {', '.join(task.labels)}"
            )
        return
    try:
        in_range = 0 <= float(label) <= 5
    except ValueError:
        in_range = False
    if not in_range:
        raise DataError(f"{where}: score {label!r}; those of {task.name} are numbers from 0 to 5")


def check_prepared(task: Task, data: Path) -> None:
    """DataError unless prepare.py wrote `data` for the task."""
    check_data_path(data)
    file = data / "task.txt"
    if not file.is_file():
        raise DataError(
            f"--data {data} is no folder that prepare.py tasks wrote: no task.txt in it"
        )
    name = file.read_text(encoding="utf-8").strip()
    if name != task.name:
        raise DataError(f"--data {data} is of {name}, not of {task.name}")
