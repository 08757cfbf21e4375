#!/usr/bin/env python3
"""Make text and the GLUE tasks ready for fairseq's masked_lm and sentence_prediction.

    python examples/glue/prepare.py text  --text FILE ... --out data/text
    python examples/glue/prepare.py tasks --raw glue_data --bpe data/text/bpe --out data/glue

`text` turns plain text into data for pre-training, and learns a BPE from it unless one is given.
`tasks` turns the official files of GLUE into data for fine-tuning, with a folder for each task.
Nothing is downloaded.

A BPE (--bpe) is a folder with dict.txt, fairseq's dictionary, and either encoder.json and
vocab.bpe (GPT-2's byte-level BPE, which the released RoBERTa models use; what is learned here is
of the same kind) or bpecodes (subword-nmt).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from fairseq.data import Dictionary, encoders, indexed_dataset
from glue import TASKS, Task, find_files, lines_of, read
from tqdm import tqdm

from evolving_attention.commands import (
    DataError,
    check_data_path,
    in_processes,
    positive,
    whole_or_not_at_all,
)


class Bpe:
    """The BPE of a folder: it splits lines into tokens, which its dictionary numbers."""

    def __init__(self, folder: Path) -> None:
        if (folder / "encoder.json").is_file() and (folder / "vocab.bpe").is_file():
            self.options = Namespace(
                bpe="gpt2",
                gpt2_encoder_json=str(folder / "encoder.json"),
                gpt2_vocab_bpe=str(folder / "vocab.bpe"),
            )
        elif (folder / "bpecodes").is_file():
            self.options = Namespace(bpe="subword_nmt", bpe_codes=str(folder / "bpecodes"))
        else:
            raise DataError(
                f"no BPE in {folder}: it needs encoder.json and vocab.bpe (GPT-2's), or bpecodes "
                "(subword-nmt), and dict.txt"
            )
        if not (folder / "dict.txt").is_file():
            raise DataError(f"no dict.txt in {folder}: the dictionary that belongs to the BPE")
        self.folder = folder
        self.dictionary = Dictionary.load(str(folder / "dict.txt"))
        try:
            encoders.build_bpe(self.options)
        except Exception as error:
            raise DataError(f"the BPE in {folder} cannot be read: {error}") from None

    def encode(self, lines: Iterable[str], workers: int) -> Iterator[str]:
        """The tokens of each line, separated by spaces; empty lines stay empty."""
        return in_processes(partial(make_encoder, self.options), lines, workers)


def make_encoder(options: Namespace) -> Callable[[str], str]:
    bpe = encoders.build_bpe(options)
    return lambda line: bpe.encode(line.strip()) if line.strip() else ""


def binarize(prefix: Path, lines: Iterable[str], dictionary: Dictionary) -> Counter[str]:
    """Writes prefix.bin and prefix.idx as fairseq-preprocess does, and counts lines and tokens."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
    counts: Counter[str] = Counter()
    for line in lines:
        tokens = dictionary.encode_line(line, add_if_not_exist=False)
        unknown = int(tokens.eq(dictionary.unk()).sum())
        counts += Counter(lines=1, tokens=len(tokens) - 1, unknown=unknown)  # all but </s>
        builder.add_item(tokens)
    builder.finalize(f"{prefix}.idx")
    return counts


def write_text(what: str, prefix: Path, lines: list[str], bpe: Bpe, workers: int) -> None:
    """Writes lines in BPE and prints their number. DataError if most tokens are unknown."""
    encoded = bpe.encode(tqdm(lines, what, disable=None), workers)
    counts = binarize(prefix, encoded, bpe.dictionary)
    if 2 * counts["unknown"] > counts["tokens"]:
        raise DataError(
            f"{what}: {counts['unknown']} of {counts['tokens']} tokens are not in "
            f"{bpe.folder / 'dict.txt'}, which belongs to another BPE or another language"
        )
    print(f"{what}: {counts['lines']} lines, {counts['tokens']} tokens", end="")
    print(f", {counts['unknown']} not in the dictionary" if counts["unknown"] else "")


# ------------------------------------------------------------------------------- text


def documents(lines: Iterable[str]) -> list[list[str]]:
    """Documents, which empty lines separate; if there are none, each line is one."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    found = [document for document in found if document]
    return [[line] for line in found[0]] if len(found) == 1 else found


def learn_bpe(documents: list[list[str]], size: int, folder: Path) -> None:
    """Learns a byte-level BPE of `size` tokens, in GPT-2's format, and writes its dictionary."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise DataError("learning a BPE needs tokenizers: pip install tokenizers") from None
    lines = [line for document in documents for line in document]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines, vocab_size=size, show_progress=False)
    folder.mkdir(parents=True)
    vocabulary, merges = tokenizer.save_model(str(folder))
    os.remove(vocabulary)
    os.replace(merges, folder / "vocab.bpe")
    numbers = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "encoder.json").write_text(json.dumps(numbers), encoding="ascii")
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(lines):
        counts.update(encoding.ids)
    # It has all tokens, even those that the text never uses, so that no text has unknown ones.
    order = sorted(numbers.values(), key=lambda number: (-counts[number], number))
    rows = "".join(f"{number} {counts[number]}\n" for number in order)
    (folder / "dict.txt").write_text(rows, encoding="ascii")


def prepare_text(args: argparse.Namespace) -> None:
    """Writes dict.txt, train and valid as masked_lm reads them, and bpe/ if none was given."""
    with new_folder(args.out) as out:
        write_text_sets(args, out)


def write_text_sets(args: argparse.Namespace, out: Path) -> None:
    found = [document for path in args.text for document in documents(lines_of(path))]
    for name in args.tasks or ():
        task = TASKS[name]
        path = find_files(task, args.raw)["train"]
        found += [list(x.inputs) for x in read(task, path, "train", args.skip_bad_lines)]
    if args.valid:
        sets = {"train": found, "valid": documents(lines_of(args.valid))}
    else:
        valid = found[args.valid_every - 1 :: args.valid_every]
        del found[args.valid_every - 1 :: args.valid_every]
        sets = {"train": found, "valid": valid}
    for name, content in sets.items():
        if not content:
            raise DataError(
                f"no text for the {name} set: give more, --valid FILE or a lower --valid-every"
            )
    if args.bpe is None:
        learn_bpe(sets["train"], args.vocabulary, out / "bpe")
    bpe = Bpe(args.bpe or out / "bpe")
    bpe.dictionary.save(str(out / "dict.txt"))
    for name, content in sets.items():
        lines = [line for document in content for line in (*document, "")]
        write_text(name, out / name, lines, bpe, args.workers)


# ------------------------------------------------------------------------------- tasks


def write_task(args: argparse.Namespace, task: Task, bpe: Bpe, out: Path) -> None:
    """Writes input0/, input1/ and label/ as sentence_prediction reads them, and task.txt."""
    (out / "label").mkdir()
    (out / "task.txt").write_text(f"{task.name}\n", encoding="utf-8")
    label_dictionary = Dictionary()
    for label in task.labels:  # in this order they are the model's classes
        label_dictionary.add_symbol(label)
    if not task.is_regression:
        label_dictionary.save(str(out / "label" / "dict.txt"))
    for split, path in find_files(task, args.raw).items():
        examples = read(task, path, split, args.skip_bad_lines)
        for index, column in enumerate(task.inputs):
            lines = [example.inputs[index] for example in examples]
            prefix = out / f"input{index}" / split
            write_text(f"{task.name} {split} {column}", prefix, lines, bpe, args.workers)
            bpe.dictionary.save(str(prefix.with_name("dict.txt")))
        if examples[0].label is None:
            continue
        if task.is_regression:  # fairseq's recipe scales the scores to [0, 1]
            scores = "".join(f"{float(example.label) / 5}\n" for example in examples)
            (out / "label" / f"{split}.label").write_text(scores)
        else:
            labels = (example.label for example in examples)
            binarize(out / "label" / split, labels, label_dictionary)


def prepare_tasks(args: argparse.Namespace) -> None:
    """Each task in a folder of its own name."""
    check_data_path(args.out)
    bpe = Bpe(args.bpe)
    tasks = [TASKS[name] for name in args.tasks or TASKS]
    for task in tasks:
        find_files(task, args.raw)
    there = [task.name for task in tasks if os.path.lexists(args.out / task.name)]
    if there:
        rest = " ".join(task.name for task in tasks if task.name not in there)
        others = f", or prepare the others, --tasks {rest}" if rest else ""
        raise DataError(
            f"{args.out} has {' '.join(there)} already; move that, choose another --out{others}"
        )
    for task in tasks:
        with new_folder(args.out / task.name) as out:
            write_task(args, task, bpe, out)


# ------------------------------------------------------------------------------- commands


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a new folder, which becomes `out` if there is no error. DataError if `out` exists, or
    if fairseq could not read it."""
    check_data_path(out)
    if os.path.lexists(out):
        raise DataError(f"{out} already exists; move it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(out) as part:
        part.mkdir()
        yield part


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    raw = "the folder of GLUE's official files: CoLA/train.tsv, ..."

    command = commands.add_parser("text", help="plain text, for masked_lm")
    command.set_defaults(prepare=prepare_text)
    add = command.add_argument
    text = "plain text, a sentence or paragraph a line, documents separated by empty lines"
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    add("--tasks", nargs="+", choices=TASKS, help="the sentences these GLUE tasks train on")
    add("--raw", type=Path, help=f"{raw}, for --tasks")
    add("--valid", type=Path, metavar="FILE", help="text to validate with")
    every = "without --valid, every N-th document is validated with (default: %(default)s)"
    add("--valid-every", type=positive, default=50, metavar="N", help=every)
    add("--bpe", type=Path, metavar="FOLDER", help="a BPE to use; else one is learned")
    size = "without --bpe, tokens of the one that is learned (default: %(default)s)"
    add("--vocabulary", type=positive, default=8000, metavar="SIZE", help=size)
    add_common_options(command)

    command = commands.add_parser("tasks", help="GLUE, for sentence_prediction")
    command.set_defaults(prepare=prepare_tasks)
    add = command.add_argument
    add("--raw", type=Path, required=True, help=raw)
    add("--tasks", nargs="+", choices=TASKS, help="which (default: all nine)")
    add("--bpe", type=Path, required=True, metavar="FOLDER", help="the BPE to use")
    add_common_options(command)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new one")
    skip = "leave out lines with a wrong number of columns, which older copies of QQP have"
    add("--skip-bad-lines", action="store_true", help=skip)
    cores = os.cpu_count()
    add("--workers", type=positive, default=cores, help="processes (default: all cores)")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "text" and not args.text and not args.tasks:
        parser.error("nothing to read: give --text FILE ... or --tasks TASK ... --raw FOLDER")
    if args.tasks and args.raw is None:
        parser.error("--tasks needs --raw, the folder of GLUE's official files")
    if args.command == "text" and args.vocabulary <= 256:
        parser.error(f"--vocabulary must be more than the 256 bytes, got {args.vocabulary}")
    try:
        args.prepare(args)
    except (DataError, OSError) as error:
        sys.exit(f"prepare.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; unfinished output is deleted, all else is unchanged")


if __name__ == "__main__":
    main()
