#!/usr/bin/env python3
"""Make parallel text ready for fairseq: tokenise, clean, split, BPE, binarise.

    python examples/translation/prepare.py iwslt14     --raw FOLDER --out data/iwslt14
    python examples/translation/prepare.py wmt14       --raw FOLDER --out data/wmt14
    python examples/translation/prepare.py wmt14-en-fr --raw FOLDER --out data/wmt14-en-fr
    python examples/translation/prepare.py multi30k    --raw FOLDER --out data/multi30k
    python examples/translation/prepare.py text --source-lang de --target-lang en \\
        --train PREFIX --valid PREFIX --test PREFIX,PREFIX2 --out DIR

The steps and their defaults are those of fairseq's prepare-iwslt14.sh, prepare-wmt14en2de.sh and
prepare-wmt14en2fr.sh, with sacremoses and subword-nmt instead of Moses' Perl scripts. Nothing is
downloaded. Each stage writes one file or folder to --out, and a later run skips the stages whose
inputs and options have not changed. Files that it did not write, or that have changed since, are
never replaced: it names them and stops before doing any work.

    raw/       sentences as they come, one a line: test.de, test.en, ... are sacreBLEU's references
    tok/       tokenised, and lower-cased where asked for
    split/     the cleaned training pairs, and the validation pairs if they are split off from them
    code       the joint BPE merges
    bpe/       all sets in BPE
    data-bin/  what fairseq-train and fairseq-generate read
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

try:
    from corpora import find_sets
    from recipes import RECIPES, Recipe, train_command
    from sentences import (
        Limits,
        Pair,
        clean,
        has_no_spaces,
        make_segmenter,
        make_tokenizer,
        read_pairs,
        write_pairs,
    )
    from stages import Report, describe, run_stages
    from subword_nmt.learn_bpe import learn_bpe
    from tqdm import tqdm

    from evolving_attention.commands import DataError, check_data_path, in_processes, positive
except ImportError as error:
    sys.exit(f"prepare.py: error: {error}; try: pip install -e '.[fairseq]' in the repository")


def progress(pairs: Iterable[Pair], what: str, total: int | None = None) -> Iterable[Pair]:
    return tqdm(pairs, what, total, unit=" pairs", disable=None)


class Preparation:
    """The stages of one run, with its options and paths."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.recipe = RECIPES[args.command]
        self.out: Path = args.out
        self.langs: tuple[str, str] = (args.source_lang, args.target_lang)
        self.limits = Limits(args.min_length, args.max_length, args.ratio)
        self.sets = find_sets(args)
        self.tests = [name for name in self.sets if name.startswith("test")]
        # every how many-th training pair goes to the validation set; None: that set is given
        self.valid_every = None if "valid" in self.sets else args.valid_every
        self.reports: dict[str, Report] = {}

    def run(self) -> None:
        """Runs the stages whose output is not there yet. DataError where the data are unfit."""
        inputs = [
            [name, *corpus.fingerprint()]
            for name, corpora in self.sets.items()
            for corpus in corpora
        ]
        limits = [asdict(self.limits), None]  # before BPE, after it
        if self.recipe.clean_after_bpe:
            limits.reverse()
        steps = [
            ("raw", [self.args.command, self.langs, inputs], self.build_raw),
            ("tok", self.token_options(), self.build_tok),
            ("split", [limits[0], self.valid_every], self.build_split),
            ("code", self.args.bpe_merges, self.build_code),
            ("bpe", limits[1], self.build_bpe),
            ("data-bin", self.args.joined_dictionary, self.build_data_bin),
        ]
        run_stages(self.out, steps if self.args.binarize else steps[:-1], self.reports)

    def token_options(self) -> dict[str, bool]:
        return {
            "tokenize": self.args.tokenize,
            "lowercase": self.args.lowercase,
            "split_hyphens": self.args.split_hyphens,
            "normalize_punctuation": self.recipe.normalize_punctuation,
            "straighten_apostrophes": self.recipe.straighten_apostrophes,
        }

    def build_raw(self, part: Path) -> Report:
        """Sentences out of the users' files, alignment and encoding checked."""
        report = {}
        for name, corpora in self.sets.items():
            pairs = (pair for corpus in corpora for pair in corpus.pairs())
            pairs = progress(pairs, f"reading {name}")
            report[name] = write_pairs(part / name, self.langs, pairs)
        return report

    def build_tok(self, part: Path) -> Report:
        for name, total in self.reports["raw"].items():
            make = partial(make_tokenizer, self.langs, self.token_options(), name == "train")
            pairs = read_pairs(self.out / "raw" / name, self.langs)
            pairs = in_processes(make, pairs, self.args.workers)
            pairs = progress(pairs, f"tokenising {name}", total)
            write_pairs(part / name, self.langs, pairs)
        return self.reports["raw"]

    def build_split(self, part: Path) -> Report:
        """The training pairs, cleaned unless that comes after BPE, without the validation set."""
        dropped: Counter[str] = Counter()
        pairs = read_pairs(self.out / "tok" / "train", self.langs)
        pairs = progress(pairs, "cleaning", self.reports["tok"]["train"])
        if not self.recipe.clean_after_bpe:
            pairs = clean(pairs, self.limits, dropped)
        valid: list[Pair] = []

        def training_pairs() -> Iterator[Pair]:
            for number, pair in enumerate(pairs, 1):
                if self.valid_every and number % self.valid_every == 0:
                    valid.append(pair)
                else:
                    yield pair

        counts = {"train": write_pairs(part / "train", self.langs, training_pairs())}
        if self.valid_every:
            counts["valid"] = write_pairs(part / "valid", self.langs, valid)
        self.check_not_empty(counts, dropped)
        left = sum(counts.values())
        if dropped.total() > left and (hint := self.segmentation_hint()):
            print(f"warning: only {left:,} training pairs are left{hint}", file=sys.stderr)
        return counts | dropped

    def build_code(self, part: Path) -> Report:
        """BPE merges learned from the training text of both languages together."""
        words: Counter[str] = Counter()
        pairs = read_pairs(self.out / "split" / "train", self.langs)
        for pair in progress(pairs, "counting words", self.reports["split"]["train"]):
            words.update(pair[0].split())
            words.update(pair[1].split())
        # keeps the progress bar out of log files
        stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
        with part.open("w", encoding="utf-8", newline="\n") as file, redirect_stderr(stderr):
            entries = (f"{word} {count}\n" for word, count in words.items())
            with suppress(ValueError):  # raised if no word has two letters
                learn_bpe(entries, file, self.args.bpe_merges, is_dict=True)
        merges = count_lines(part) - 1  # the first line is the version
        if merges < 1:
            raise DataError(
                f"{self.reports['split']['train']} training pairs are too few to learn BPE from: "
                "no two letters stand side by side twice; give more text"
            )
        return {"word types": len(words), "merges": merges, "asked for": self.args.bpe_merges}

    def build_bpe(self, part: Path) -> Report:
        """All sets in BPE. Where the recipe cleans afterwards, it cleans what comes from the
        training text; a validation set that was given and the test sets stay whole."""
        make = partial(make_segmenter, self.out / "code")
        report: Report = {}
        dropped: Counter[str] = Counter()
        for name in ("train", "valid", *self.tests):
            stage = "split" if name in self.reports["split"] else "tok"
            pairs = read_pairs(self.out / stage / name, self.langs)
            pairs = in_processes(make, pairs, self.args.workers)
            pairs = progress(pairs, f"BPE of {name}", self.reports[stage][name])
            if self.recipe.clean_after_bpe and stage == "split":
                pairs = clean(pairs, self.limits, dropped)
            report[name] = write_pairs(part / name, self.langs, pairs)
        self.check_not_empty(report, dropped)
        return report | dropped

    def build_data_bin(self, part: Path) -> Report:
        """fairseq-preprocess. DataError with the end of its output if it fails."""
        command = ["-m", "fairseq_cli.preprocess", "--workers", str(self.args.workers)]
        command += ["--source-lang", self.langs[0], "--target-lang", self.langs[1]]
        command += ["--trainpref", "bpe/train", "--validpref", "bpe/valid"]
        if self.tests:
            command += ["--testpref", ",".join(f"bpe/{name}" for name in self.tests)]
        if self.args.joined_dictionary:
            command.append("--joined-dictionary")
        print("data-bin: fairseq-preprocess is at work", file=sys.stderr, flush=True)
        # run in the output folder: a comma in its path would split --testpref
        done = subprocess.run(
            [sys.executable, *command, "--destdir", str(part.relative_to(self.out))],
            cwd=self.out,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            tail = "\n".join(done.stdout.split("\n")[-20:])
            raise DataError(f"fairseq-preprocess failed (exit status {done.returncode}):\n{tail}")
        return {f"dictionary {lang}": count_lines(part / f"dict.{lang}.txt") for lang in self.langs}

    def check_not_empty(self, counts: Report, dropped: Counter[str]) -> None:
        """DataError if cleaning and splitting left nothing to train on or to validate with."""
        left = counts["train"] + (counts["valid"] if self.valid_every else 0)
        if not left:
            raise DataError(
                f"cleaning left no training pair: {describe(dropped)}{self.segmentation_hint()}; "
                "loosen --min-length, --max-length or --ratio, or look whether the two sides "
                "belong together"
            )
        if not counts["train"] or not counts.get("valid", 1):
            raise DataError(
                f"cleaning left {left} pairs, too few to make every {self.valid_every}-th one the "
                "validation set; lower --valid-every or give a validation set"
            )

    def segmentation_hint(self) -> str:
        """What to do about a language that is written without spaces, if one is."""
        pairs = list(islice(read_pairs(self.out / "raw" / "train", self.langs), 1000))
        texts = ("".join(side) for side in zip(*pairs, strict=True))
        found = [lang for lang, text in zip(self.langs, texts, strict=True) if has_no_spaces(text)]
        if not found:
            return ""
        return (
            f"; {' and '.join(found)} has no spaces between words, so that a sentence counts as "
            "one word: if that is not done yet, segment it into words first (jieba for Chinese, "
            "MeCab for Japanese, PyThaiNLP and --no-tokenize for Thai), or give --ratio inf"
        )


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


# -------------------------------------------------------------------------- command line


def language(text: str) -> str:
    """An argparse type: a language code that fits in fairseq's file names (train.de-en.de)."""
    if not re.fullmatch(r"\w+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not letters, digits and _, such as de or en_XX"
        )
    return text


def prefixes(text: str) -> list[str]:
    """An argparse type: names or prefixes, separated by commas."""
    return [part for part in text.split(",") if part]


def add_common_options(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """The options of every subcommand, with the recipe's values as defaults."""
    add = parser.add_argument
    switch = partial(add, action=argparse.BooleanOptionalAction)
    number = partial(add, type=positive, metavar="N")
    out = "where everything is written"
    add("--out", type=Path, metavar="DIR", help=out, required=True, default=argparse.SUPPRESS)
    switch("--tokenize", default=True, help="Moses tokenisation, with escapes such as &apos;")
    switch("--split-hyphens", default=recipe.split_hyphens, help="make a-b into a @-@ b")
    switch("--lowercase", default=recipe.lowercase, help="all sets")
    number("--min-length", default=1, help="drop training pairs with a side of fewer tokens")
    number("--max-length", default=recipe.max_length, help="... or of more")
    add("--ratio", type=float, default=1.5, metavar="X", help="... or longer/shorter above this")
    split = "every N-th training pair goes to the validation set, if none is given"
    number("--valid-every", default=recipe.valid_every, help=split)
    number("--bpe-merges", default=recipe.bpe_merges, help="for both languages together")
    switch("--joined-dictionary", default=True, help="one dictionary for both languages")
    switch("--binarize", default=True, help="run fairseq-preprocess at the end")
    number("--workers", default=os.cpu_count() or 1, help="processes")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    directions = {"iwslt14": ("de", "en"), "wmt14": ("en", "de")}
    directions |= {"wmt14-en-fr": ("en", "fr"), "multi30k": ("de", "en")}
    for name, recipe in RECIPES.items():
        command = commands.add_parser(
            name, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )
        langs = directions.get(name, (None, None))
        for side, lang in zip(("source", "target"), langs, strict=True):
            command.add_argument(
                f"--{side}-lang",
                type=language,
                default=lang,
                required=lang is None,
                choices=sorted(langs) if name not in ("multi30k", "text") else None,
                help=f"{side} language",
            )
        add_data_options(command, name)
        add_common_options(command, recipe)
    return parser


def add_data_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that say where a subcommand's data are."""
    add = parser.add_argument
    needed = {"required": True, "default": argparse.SUPPRESS}  # no "(default: None)" in the help
    if name == "text":
        pairs = "PREFIX.SRC and PREFIX.TRG, or both with .gz"
        add("--train", type=prefixes, metavar="PREFIX[,PREFIX]", help=pairs, **needed)
        add("--valid", metavar="PREFIX", help="default: split off from --train")
        add("--test", type=prefixes, default=[], metavar="PREFIX[,PREFIX]", help=pairs)
        return
    add("--raw", type=Path, help="folder of the official files, unpacked", **needed)
    if name == "wmt14":
        versions = "v12 (WMT'17) as in fairseq's recipe, v9 for WMT'14's own data"
        add("--news-commentary", choices=["v9", "v12"], default="v12", help=versions)
    if name in ("wmt14", "wmt14-en-fr"):
        valid = "split off from the training text as in fairseq's recipe, or newstest2013"
        add("--valid", choices=["split", "newstest2013"], default="split", help=valid)
    if name == "multi30k":
        tests = "such as test_2016_flickr; default: every test*.SRC there is"
        add("--tests", type=prefixes, default=[], metavar="NAME[,NAME]", help=tests)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 and one line for options that contradict each other."""
    if args.source_lang == args.target_lang:
        parser.error(f"source and target language are both {args.source_lang}; give two languages")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder, new or of an earlier run")
    if not args.ratio >= 1:  # "not ... >=" so that nan is caught as well
        parser.error(f"--ratio {args.ratio:g}: longer side / shorter side is never below 1")
    if args.min_length > args.max_length:
        parser.error(f"--min-length {args.min_length} is above --max-length {args.max_length}")
    if args.valid_every < 2:
        parser.error("--valid-every 1 leaves nothing to train on; give 2 or more")
    if args.binarize:
        check_data_path(args.out)
    if args.binarize and importlib.util.find_spec("fairseq_cli") is None:
        parser.error("fairseq is not installed; install it, or stop before it with --no-binarize")


def main(argv: list[str] | None = None) -> None:
    tqdm.monitor_interval = 0  # no thread beside the forking of the workers
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_options(parser, args)
        preparation = Preparation(args)
        preparation.run()
        for name in preparation.tests:
            places = ", ".join(str(corpus.source) for corpus in preparation.sets[name])
            print(f"--gen-subset {name}: {places}")
        if args.binarize:
            print(f"\nTrain with:\n\n{train_command(args)}")
    except DataError as error:
        sys.exit(f"prepare.py: error: {error}")
    except OSError as error:
        sys.exit(f"prepare.py: error: {error.filename or args.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command goes on from the stage it was in")


if __name__ == "__main__":
    main()
