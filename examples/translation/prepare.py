#!/usr/bin/env python3
"""Make parallel text ready for fairseq: tokenise, clean, split, BPE, binarise.

    python examples/translation/prepare.py iwslt14  --raw de-en.tgz --out data/iwslt14
    python examples/translation/prepare.py wmt14    --raw FOLDER --out data/wmt14
    python examples/translation/prepare.py multi30k --raw FOLDER --out data/multi30k
    python examples/translation/prepare.py text --source-lang de --target-lang en \\
        --train PREFIX --valid PREFIX --test PREFIX,PREFIX2 --out DIR

The steps and their defaults are those of fairseq's prepare-iwslt14.sh and prepare-wmt14en2de.sh,
on sacremoses and subword-nmt in place of Moses' Perl scripts. Nothing is downloaded. Each stage
leaves one file or folder in --out, and a later run skips the stages whose inputs and options
have not changed. What it did not write itself, or what has changed since, it neither replaces nor
deletes: it stops before any work and says what is in the way.

    raw/       sentences as they come, one a line: test.de, test.en, ... are sacreBLEU's references
    tok/       tokenised, and lower-cased where asked for
    split/     the cleaned training pairs, and the validation pairs if they are split off from them
    code       the joint BPE merges
    bpe/       all sets in BPE
    data-bin/  what fairseq-train and fairseq-generate read
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO

try:
    from sacremoses import MosesPunctNormalizer, MosesTokenizer
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe
    from tqdm import tqdm

    from evolving_attention.commands import (
        PART,
        DataError,
        alone_in,
        check_data_path,
        positive,
        text_lines,
        whole_or_not_at_all,
    )
except ImportError as error:
    sys.exit(f"prepare.py: error: {error}; try: pip install -e '.[fairseq]' in the repository")

Pair = tuple[str, str]
Report = dict[str, int]

STAMP_VERSION = 1  # raise it when a stage's output changes for the same options
BLOCK_PAIRS = 1000  # pairs handed to a worker at a time
SCRIPTS_WITHOUT_SPACES = "CJK HIRAGANA KATAKANA THAI LAO KHMER MYANMAR TIBETAN".split()
MAX_WORD_CHARS = 1000  # clean-corpus-n.perl drops pairs with longer words


# ------------------------------------------------------------------------------- recipes


EVAL_BLEU = """\
--eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}'
--eval-bleu-detok moses --eval-bleu-remove-bpe
--best-checkpoint-metric bleu --maximize-best-checkpoint-metric"""
SMALL_DATA = "--dropout 0.3 --weight-decay 0.0001 --max-tokens 4096 --keep-last-epochs 10"


@dataclass(frozen=True)
class Recipe:
    """What one data set's usual preparation and training look like."""

    lowercase: bool = False
    split_hyphens: bool = False  # tokenizer.perl -a
    normalize_punctuation: bool = False  # of the training text, as in fairseq's WMT script
    straighten_apostrophes: bool = False  # of the test text, as in both of fairseq's scripts
    max_length: int = 175  # tokens a side; BPE tokens where clean_after_bpe
    clean_after_bpe: bool = False
    valid_every: int = 23
    bpe_merges: int = 10_000
    arch: str = "ea_transformer_iwslt_de_en"
    train_options: tuple[str, ...] = (
        "--lr 5e-4 --warmup-updates 4000 --max-epoch 60",
        SMALL_DATA,
        EVAL_BLEU,
    )


RECIPES = {
    "iwslt14": Recipe(lowercase=True, straighten_apostrophes=True),
    "wmt14": Recipe(
        split_hyphens=True,
        normalize_punctuation=True,
        straighten_apostrophes=True,
        max_length=250,
        clean_after_bpe=True,
        valid_every=100,
        bpe_merges=40_000,
        arch="ea_transformer_vaswani_wmt_en_de_big",
        train_options=(
            "--lr 5e-4 --warmup-updates 4000 --warmup-init-lr 1e-07 --max-update 300000",
            "--dropout 0.3 --weight-decay 0.0 --max-tokens 3584 --keep-last-epochs 10 --fp16",
        ),
    ),
    "multi30k": Recipe(
        lowercase=True,
        arch="ea_transformer_lite",
        train_options=(
            "--lr 5e-4 --warmup-updates 2000 --max-update 8000",
            SMALL_DATA,
            EVAL_BLEU,
        ),
    ),
    "text": Recipe(),
}

IWSLT14_TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


STAGES = ("raw", "tok", "split", "code", "bpe", "data-bin")
STAMPS = ".stamps"

# ------------------------------------------------------------------- reading what users have


@dataclass(frozen=True)
class TextFile:
    """A plain file, a .gz file, or a member of a tar archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def stem(self) -> str:
        """The file's name without folders and without .gz."""
        return (self.member or str(self.path)).rpartition("/")[2].removesuffix(".gz")

    def fingerprint(self) -> list[str | int | None]:
        """What changes when the file does: place, bytes, nanoseconds."""
        stat = self.path.stat()
        return [str(self.path.resolve()), self.member, stat.st_size, stat.st_mtime_ns]

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The decompressed bytes. DataError where the name and the content disagree."""
        with contextlib.ExitStack() as stack:
            if self.member:
                archive = stack.enter_context(tarfile.open(self.path))
                stream = stack.enter_context(archive.extractfile(self.member))
            else:
                stream = stack.enter_context(self.path.open("rb"))
            zipped, named_gz = stream.read(2) == b"\x1f\x8b", str(self).endswith(".gz")
            stream.seek(0)
            if zipped and not named_gz:
                raise DataError(f"{self}: gzip data; rename it to {self.stem}.gz or gunzip it")
            if named_gz and not zipped:
                raise DataError(f"{self}: not gzip data; rename it without .gz if it is plain text")
            yield stack.enter_context(gzip.open(stream)) if zipped else stream

    def lines(self) -> Iterator[str]:
        """Lines without their \\n. DataError if the file is damaged or not UTF-8 text."""
        try:
            with self.open() as stream:
                yield from text_lines(stream, self)
        except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.ReadError) as error:
            raise DataError(f"{self}: damaged or incomplete ({error}); get it again") from None


class Finder:
    """Finds files by name in a folder, at any depth and inside its tar archives too."""

    def __init__(self, raw: Path, out: Path) -> None:
        """raw: a folder or one tar archive. out: the output folder, whose stages are not searched.
        DataError if raw is neither."""
        if not raw.exists():
            raise DataError(f"{raw}: no such file or folder; --raw is where the data lie")
        check_input(raw, out)
        endings = (".tgz", ".tar.gz", ".tar")
        if raw.is_file() and not raw.name.endswith(endings):
            raise DataError(f"{raw}: neither a folder nor a {', '.join(endings)} archive")
        paths = sorted(raw.rglob("*")) if raw.is_dir() else [raw]
        places = written_places(out)
        paths = [path for path in paths if path.is_file() and not place_of(path, places)]
        self.raw = raw
        self.archives = [path for path in paths if path.name.endswith(endings)]
        self.files = [TextFile(path) for path in paths if not path.name.endswith(endings)]
        self._members: list[TextFile] | None = None

    def members(self) -> list[TextFile]:
        """The files in the archives, listed when first asked for: that reads them whole."""
        if self._members is None:
            self._members = []
            for path in tqdm(self.archives, "listing archives", unit="file", disable=None):
                try:
                    with tarfile.open(path) as archive:
                        names = [member.name for member in archive if member.isfile()]
                except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
                    raise DataError(f"{path}: damaged or no tar archive ({error})") from None
                self._members += [TextFile(path, name) for name in names]
        return self._members

    def find(self, *names: str) -> TextFile:
        """The one file called by any of these names; extracted files come before archived ones.
        DataError if there is none, or more than one."""
        found = [file for file in self.files if file.stem in names]
        found = found or [file for file in self.members() if file.stem in names]
        if not found:
            raise DataError(f"{self.raw}: no {' or '.join(names)} in it (nor in its tar archives)")
        if len(found) > 1:
            places = ", ".join(map(str, found))
            raise DataError(f"{self.raw}: more than one {names[0]}, keep one of: {places}")
        return found[0]


def written_places(out: Path) -> dict[Path, Path]:
    """Where --out is written to: real paths, and what they are called."""
    return {(out / name).resolve(): out / name for name in (*STAGES, STAMPS)}


def place_of(path: Path, places: dict[Path, Path]) -> Path | None:
    """The one of the places that the path is, or lies in."""
    path = path.resolve()
    return next((places[x] for x in (path, *path.parents) if x in places), None)


def check_input(path: Path, out: Path) -> None:
    """DataError if the path lies where --out is written to."""
    if place := place_of(path, written_places(out)):
        raise DataError(
            f"{path} lies in {place}, which --out {out} writes; move it, or give another --out"
        )


@dataclass(frozen=True)
class Corpus:
    """Two files of which sentence n of one translates sentence n of the other."""

    source: TextFile
    target: TextFile
    parse: Callable[[Iterable[str]], Iterator[str]] = iter  # lines of the file -> sentences

    def pairs(self) -> Iterator[Pair]:
        """All pairs, white space made single spaces. DataError if there are none, or if one side
        has more sentences than the other."""
        counts = {self.source: 0, self.target: 0}
        sides = zip_longest(self.parse(self.source.lines()), self.parse(self.target.lines()))
        for source, target in sides:
            counts[self.source] += source is not None
            counts[self.target] += target is not None
            if source is not None and target is not None:
                # as fairseq does on reading; a \r inside a sentence would be a line end to it
                yield " ".join(source.split()), " ".join(target.split())
        for file, count in counts.items():
            if not count:
                official = "" if self.parse is iter else " or, here, the official file"
                raise DataError(f"{file}: no sentence in it; one a line is right{official}")
        if counts[self.source] != counts[self.target]:
            found = " but ".join(f"{file} has {count} lines" for file, count in counts.items())
            raise DataError(
                f"not aligned: {found}; line n of one must translate line n of the other"
            )


def parse_iwslt_train(lines: Iterable[str]) -> Iterator[str]:
    """Sentences of an IWSLT train.tags file: titles and descriptions count, other tags do not."""
    for line in lines:
        if not any(tag in line for tag in ("<url>", "<talkid>", "<keywords>")):
            yield re.sub(r"</?(title|description)>", "", line)


def parse_segments(lines: Iterable[str]) -> Iterator[str]:
    """Sentences of the .xml and .sgm files of IWSLT and WMT: what stands in <seg id="1">."""
    for line in lines:
        if "<seg id" in line:
            yield re.sub(r'<seg id="[0-9]*">\s*|\s*</seg>\s*', "", line)


# --------------------------------------------------------- where each recipe finds its sets

Sets = dict[str, list[Corpus]]  # "train", "valid" (optional), "test", "test1", ...


def iwslt14_sets(args: argparse.Namespace) -> Sets:
    """The training set and, as one test set, the five dev and test sets fairseq joins."""
    finder, langs = Finder(args.raw, args.out), (args.source_lang, args.target_lang)
    train = [finder.find(f"train.tags.de-en.{lang}") for lang in langs]
    tests = [
        Corpus(*(finder.find(f"IWSLT14.{name}.de-en.{lang}.xml") for lang in langs), parse_segments)
        for name in IWSLT14_TESTS
    ]
    return {"train": [Corpus(*train, parse_iwslt_train)], "test": tests}


def wmt14_sets(args: argparse.Namespace) -> Sets:
    """Europarl, Common Crawl and News Commentary to train on, newstest2014 as the test set."""
    finder, langs = Finder(args.raw, args.out), (args.source_lang, args.target_lang)
    names = ("europarl-v7", "commoncrawl", f"news-commentary-{args.news_commentary}")

    def corpus(name: str) -> Corpus:
        return Corpus(*(finder.find(f"{name}.{lang}") for lang in langs))

    sets = {"train": [corpus(f"{name}.de-en") for name in names]}
    if args.valid == "newstest2013":
        sets["valid"] = [corpus("newstest2013")]
    roles = zip(("src", "ref"), langs, strict=True)
    test = [finder.find(f"newstest2014-deen-{role}.{lang}.sgm") for role, lang in roles]
    return sets | {"test": [Corpus(*test, parse_segments)]}


def multi30k_sets(args: argparse.Namespace) -> Sets:
    """train, val and the test sets of --tests, or every test*.SRC that has its test*.TRG."""
    finder, langs = Finder(args.raw, args.out), (args.source_lang, args.target_lang)

    def corpus(*names: str) -> Corpus:
        return Corpus(*(finder.find(*(f"{name}.{lang}" for name in names)) for lang in langs))

    tests = args.tests or multi30k_tests(finder, langs)
    sets = {"train": [corpus("train")], "valid": [corpus("val", "valid")]}
    return sets | {test_name(i): [corpus(name)] for i, name in enumerate(tests)}


def multi30k_tests(finder: Finder, langs: tuple[str, str]) -> list[str]:
    """Names of the test sets that are there in both languages, in alphabetical order."""
    files = [file for file in finder.files if file.stem.startswith("test")]
    names = [file.stem for file in files or finder.members()]
    stems = [
        {name.removesuffix(f".{lang}") for name in names if re.match(rf"test.*\.{lang}$", name)}
        for lang in langs
    ]
    if not stems[0] & stems[1]:
        raise DataError(f"{finder.raw}: no test set in it (test*.{langs[0]} with test*.{langs[1]})")
    return sorted(stems[0] & stems[1])


def text_sets(args: argparse.Namespace) -> Sets:
    """PREFIX.de and PREFIX.en, or either with .gz, for each prefix given."""

    def file(prefix: str, lang: str) -> TextFile:
        paths = [Path(f"{prefix}.{lang}"), Path(f"{prefix}.{lang}.gz")]
        for path in paths:
            if path.is_file():
                check_input(path, args.out)
                return TextFile(path)
        raise DataError(f"{paths[0]}: no such file (nor {paths[1].name})")

    def corpus(prefix: str) -> Corpus:
        return Corpus(file(prefix, args.source_lang), file(prefix, args.target_lang))

    sets = {"train": [corpus(prefix) for prefix in args.train]}
    if args.valid:
        sets["valid"] = [corpus(args.valid)]
    return sets | {test_name(i): [corpus(prefix)] for i, prefix in enumerate(args.test)}


def test_name(index: int) -> str:
    """fairseq-preprocess' names: test, test1, test2, ..."""
    return f"test{index}" if index else "test"


FIND_SETS = {
    "iwslt14": iwslt14_sets,
    "wmt14": wmt14_sets,
    "multi30k": multi30k_sets,
    "text": text_sets,
}

# ------------------------------------------------------------------- our own files, in pairs


def side_paths(prefix: Path, langs: tuple[str, str]) -> list[Path]:
    return [prefix.with_name(f"{prefix.name}.{lang}") for lang in langs]


@contextlib.contextmanager
def pair_writer(prefix: Path, langs: tuple[str, str]) -> Iterator[Callable[[Pair], None]]:
    """A function that appends one pair to prefix.SRC and prefix.TRG."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    source, target = side_paths(prefix, langs)
    with (
        source.open("w", encoding="utf-8", newline="\n") as source_file,
        target.open("w", encoding="utf-8", newline="\n") as target_file,
    ):

        def write(pair: Pair) -> None:
            source_file.write(pair[0] + "\n")
            target_file.write(pair[1] + "\n")

        yield write


def read_pairs(prefix: Path, langs: tuple[str, str]) -> Iterator[Pair]:
    source, target = side_paths(prefix, langs)
    with (
        source.open(encoding="utf-8", newline="\n") as source_file,
        target.open(encoding="utf-8", newline="\n") as target_file,
    ):
        for pair in zip(source_file, target_file, strict=True):
            yield pair[0].rstrip("\n"), pair[1].rstrip("\n")


# ---------------------------------------------------------------------- work in processes

_transform: Callable[[Pair], Pair]  # set once in every worker


def _start_worker(make: Callable[[], Callable[[Pair], Pair]]) -> None:
    global _transform
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to tell about
    _transform = make()


def _transform_block(block: list[Pair]) -> list[Pair]:
    return [_transform(pair) for pair in block]


def transformed(
    pairs: Iterable[Pair], make: Callable[[], Callable[[Pair], Pair]], workers: int
) -> Iterator[Pair]:
    """The pairs, in their order, put through the function that `make` makes in each process.
    Only a few blocks are in memory at a time. DataError if a process is killed."""
    if workers == 1:
        yield from map(make(), pairs)
        return
    pairs, pending = iter(pairs), deque()
    blocks = iter(lambda: list(islice(pairs, BLOCK_PAIRS)), [])
    try:
        with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(make,)) as pool:
            for block in blocks:
                pending.append(pool.submit(_transform_block, block))
                if len(pending) > 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        message = "a worker process was killed, perhaps for want of memory; try fewer --workers"
        raise DataError(message) from None


def make_tokenizer(
    langs: tuple[str, str], options: dict[str, bool], is_train: bool
) -> Callable[[Pair], Pair]:
    """A function that tokenises a pair as Moses' tokenizer.perl does, escapes (&apos;) included."""
    sides = [_side_tokenizer(lang, options, is_train) for lang in langs]
    return lambda pair: (sides[0](pair[0]), sides[1](pair[1]))


def _side_tokenizer(lang: str, options: dict[str, bool], is_train: bool) -> Callable[[str], str]:
    normalizer = MosesPunctNormalizer(lang, perl_parity=True)
    tokenizer = MosesTokenizer(lang)

    def tokenize(text: str) -> str:
        if is_train and options["normalize_punctuation"]:
            text = replace_control_characters(normalizer.normalize(text))
        if not is_train and options["straighten_apostrophes"]:
            text = text.replace("\u2019", "'")
        if options["tokenize"]:
            text = tokenizer.tokenize(
                text, aggressive_dash_splits=options["split_hyphens"], return_str=True
            )
        return " ".join((text.lower() if options["lowercase"] else text).split())

    return tokenize


def replace_control_characters(text: str) -> str:
    """Characters of Unicode's classes C* become spaces, as in remove-non-printing-char.perl."""
    if text.isprintable():
        return text
    return "".join(" " if unicodedata.category(char)[0] == "C" else char for char in text)


def make_segmenter(code: Path) -> Callable[[Pair], Pair]:
    """A function that splits the words of a pair into BPE pieces."""
    with code.open(encoding="utf-8", newline="\n") as file:
        bpe = BPE(file)
    return lambda pair: (bpe.process_line(pair[0]), bpe.process_line(pair[1]))


# ------------------------------------------------------------------------------ cleaning


@dataclass(frozen=True)
class Limits:
    """Which pairs Moses' clean-corpus-n.perl keeps; lengths in tokens."""

    min_length: int
    max_length: int
    ratio: float

    def reason_to_drop(self, pair: Pair) -> str | None:
        words = [side.split() for side in pair]
        shorter, longer = sorted(map(len, words))
        if shorter == 0:
            return "empty"
        if longer > self.max_length:
            return f"longer than {self.max_length}"
        if shorter < self.min_length:
            return f"shorter than {self.min_length}"
        if longer / shorter > self.ratio:
            return f"length ratio above {self.ratio:g}"
        if max(map(len, words[0] + words[1])) > MAX_WORD_CHARS:
            return f"word above {MAX_WORD_CHARS} characters"
        return None


def clean(pairs: Iterable[Pair], limits: Limits | None, dropped: Counter[str]) -> Iterator[Pair]:
    """The pairs within the limits (None: all of them); counts the others by reason."""
    for pair in pairs:
        reason = limits and limits.reason_to_drop(pair)
        if reason:
            dropped[f"dropped ({reason})"] += 1
        else:
            yield pair


# -------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """How a file or folder of --out is made. It appears there whole or not at all.

    The stamp says which options it was made with and what was written. Only that is ever replaced:
    what the stamp does not list, and what has changed since, is the user's."""

    out: Path
    name: str
    digest: str  # of its options and of all stages before it
    build: Callable[[Path], Report]  # writes it to a path

    @property
    def target(self) -> Path:
        return self.out / self.name

    @property
    def stamp(self) -> Path:
        return self.out / STAMPS / f"{self.name}.json"

    def record(self) -> dict:
        """The stamp of an earlier run; empty if there is none. DataError if it is no stamp."""
        try:
            record = json.loads(self.stamp.read_text(encoding="utf-8"))
            return {key: record[key] for key in ("digest", "report", "sizes")} | record
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.stamp} is no stamp of prepare.py; give another --out") from None

    def finished(self) -> Report | None:
        """The report of an earlier run, if all that it wrote is still there."""
        record = self.record()
        if record.get("digest") != self.digest:
            return None
        for name, size in record["sizes"].items():
            path = self.target / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return record["report"]

    def in_the_way(self) -> list[Path]:
        """What stands where the stage is written, but was not written by it, or changed since."""
        if self.target.is_symlink():
            return [self.target]
        known = self.record().get("sha256", {})
        found = contents(self.target)
        others = [path for name, path in found.items() if checksum(path) != known.get(name, "")]
        return [self.target] if found and len(others) == len(found) else others

    def run(self) -> Report:
        report = self.finished()
        if report is not None:
            print(f"{self.name:9}{describe(report)} (unchanged, skipped)", flush=True)
            return report
        with whole_or_not_at_all(self.target, within=self.stamp.parent) as part:
            report = self.build(part)
            written = contents(part)
            record = {"digest": self.digest, "report": report}
            record["sizes"] = {name: path.stat().st_size for name, path in written.items()}
            record["sha256"] = {name: checksum(path) for name, path in written.items()}
            check_targets([self])  # once more, for the work may have taken hours
            for path in contents(self.target).values():
                path.unlink()
            if self.target.is_dir():
                self.target.rmdir()
            with whole_or_not_at_all(self.stamp, overwrite=True) as stamp:
                stamp.write_text(json.dumps(record), encoding="utf-8")
        print(f"{self.name:9}{describe(report)}", flush=True)
        return report


def check_targets(stages: Iterable[Stage]) -> None:
    """DataError if what a stage would replace is not its own."""
    paths = [path for stage in stages if stage.finished() is None for path in stage.in_the_way()]
    if paths:
        names = ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" * (len(paths) > 5))
        raise DataError(
            f"in the way of what is to be written: {names}; this prepare.py did not write that, or "
            "it has changed since. Move or delete it, or give another --out"
        )


def contents(path: Path) -> dict[str, Path]:
    """The file at `path`, or what is in the folder `path`, by relative names."""
    if path.is_dir():
        return {str(found.relative_to(path)): found for found in sorted(path.rglob("*"))}
    return {".": path} if os.path.lexists(path) else {}


def checksum(path: Path) -> str | None:
    """SHA-256 of a file; None for a link, a folder and what else is no file."""
    if path.is_symlink() or not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(partial(file.read, 2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def describe(report: Report) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in report.items())


def progress(pairs: Iterable[Pair], what: str, total: int | None = None) -> Iterable[Pair]:
    return tqdm(pairs, what, total, unit=" pairs", disable=None)


class Preparation:
    """The stages of one run, with its options and paths."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.recipe = RECIPES[args.command]
        self.out: Path = args.out
        self.langs: tuple[str, str] = (args.source_lang, args.target_lang)
        limits = Limits(args.min_length, args.max_length, args.ratio)
        self.limits_before_bpe = None if self.recipe.clean_after_bpe else limits
        self.limits_after_bpe = limits if self.recipe.clean_after_bpe else None
        self.sets = FIND_SETS[args.command](args)
        self.tests = [name for name in self.sets if name.startswith("test")]
        # every how many-th training pair goes to the validation set; None: that set is given
        self.valid_every = None if "valid" in self.sets else args.valid_every
        self.reports: dict[str, Report] = {}

    def run(self) -> None:
        """Runs the stages whose output is not there yet. DataError where the data are unfit."""
        inputs = [
            [name, corpus.source.fingerprint(), corpus.target.fingerprint()]
            for name, corpora in self.sets.items()
            for corpus in corpora
        ]
        limits = [x and asdict(x) for x in (self.limits_before_bpe, self.limits_after_bpe)]
        steps = {
            "raw": ([self.args.command, self.langs, inputs], self.build_raw),
            "tok": (self.token_options(), self.build_tok),
            "split": ([limits[0], self.valid_every], self.build_split),
            "code": (self.args.bpe_merges, self.build_code),
            "bpe": (limits[1], self.build_bpe),
            "data-bin": (self.args.joined_dictionary, self.build_data_bin),
        }
        stages, digest = [], ""
        for name in STAGES if self.args.binarize else STAGES[:-1]:
            options, build = steps[name]
            key = json.dumps([STAMP_VERSION, digest, name, options], sort_keys=True)
            digest = hashlib.sha256(key.encode()).hexdigest()
            stages.append(Stage(self.out, name, digest, build))
        check_targets(stages)
        (self.out / STAMPS).mkdir(parents=True, exist_ok=True)
        with alone_in(self.out):
            for left in self.out.glob(f"{STAMPS}/{PART}*"):  # by a run that was killed
                shutil.rmtree(left)
            for stage in stages:
                self.reports[stage.name] = stage.run()

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
            report[name] = self.write(part / name, progress(pairs, f"reading {name}"))
        return report

    def build_tok(self, part: Path) -> Report:
        for name, total in self.reports["raw"].items():
            make = partial(make_tokenizer, self.langs, self.token_options(), name == "train")
            pairs = read_pairs(self.out / "raw" / name, self.langs)
            pairs = transformed(pairs, make, self.args.workers)
            self.write(part / name, progress(pairs, f"tokenising {name}", total))
        return self.reports["raw"]

    def build_split(self, part: Path) -> Report:
        """The training pairs, cleaned unless that comes after BPE, without the validation set."""
        dropped: Counter[str] = Counter()
        pairs = read_pairs(self.out / "tok" / "train", self.langs)
        pairs = progress(pairs, "cleaning", self.reports["tok"]["train"])
        pairs = clean(pairs, self.limits_before_bpe, dropped)
        counts = {"train": 0} if self.valid_every is None else {"train": 0, "valid": 0}
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(pair_writer(part / name, self.langs)) for name in counts
            }
            for number, pair in enumerate(pairs, 1):
                to_valid = self.valid_every and number % self.valid_every == 0
                name = "valid" if to_valid else "train"
                counts[name] += 1
                writers[name](pair)
        self.check_not_empty(counts, dropped)
        left = sum(counts.values())
        if sum(dropped.values()) > left and (hint := self.segmentation_hint()):
            print(f"warning: only {left:,} training pairs are left{hint}", file=sys.stderr)
        return counts | dropped

    def build_code(self, part: Path) -> Report:
        """BPE merges learned from the training text of both languages together."""
        words: Counter[str] = Counter()
        pairs = read_pairs(self.out / "split" / "train", self.langs)
        for pair in progress(pairs, "counting words", self.reports["split"]["train"]):
            words.update(pair[0].split())
            words.update(pair[1].split())
        with part.open("w", encoding="utf-8", newline="\n") as file, quiet_without_terminal():
            entries = (f"{word} {count}\n" for word, count in words.items())
            with contextlib.suppress(ValueError):  # raised if no word has two letters
                learn_bpe(entries, file, self.args.bpe_merges, is_dict=True)
        with part.open(encoding="utf-8", newline="\n") as file:
            merges = sum(1 for _ in file) - 1  # the first line is the version
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
            pairs = transformed(pairs, make, self.args.workers)
            pairs = progress(pairs, f"BPE of {name}", self.reports[stage][name])
            limits = self.limits_after_bpe if stage == "split" else None
            report[name] = self.write(part / name, clean(pairs, limits, dropped))
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

    def write(self, prefix: Path, pairs: Iterable[Pair]) -> int:
        """Writes the pairs to prefix.SRC and prefix.TRG; how many there were."""
        count = 0
        with pair_writer(prefix, self.langs) as write:
            for pair in pairs:
                write(pair)
                count += 1
        return count

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
        pairs = list(islice(read_pairs(self.out / "raw" / "train", self.langs), BLOCK_PAIRS))
        texts = ("".join(side) for side in zip(*pairs, strict=True))
        found = [lang for lang, text in zip(self.langs, texts, strict=True) if has_no_spaces(text)]
        if not found:
            return ""
        return (
            f"; {' and '.join(found)} has no spaces between words, so that a sentence counts as "
            "one word: if that is not done yet, segment it into words first (jieba for Chinese, "
            "MeCab for Japanese, PyThaiNLP and --no-tokenize for Thai), or give --ratio inf"
        )


def has_no_spaces(text: str) -> bool:
    """Whether most of its letters are of scripts that put no spaces between words."""
    scripts = Counter(unicodedata.name(char, "").split(" ")[0] for char in text if char.isalpha())
    return 2 * sum(scripts[script] for script in SCRIPTS_WITHOUT_SPACES) > scripts.total()


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


@contextlib.contextmanager
def quiet_without_terminal() -> Iterator[None]:
    """learn_bpe draws its progress bar in log files too; this keeps them free of it."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


# -------------------------------------------------------------------------- command line


def train_command(args: argparse.Namespace) -> str:
    """The fairseq-train command for the prepared data, ready to paste in the repository root."""
    recipe = RECIPES[args.command]
    share = "all-embeddings" if args.joined_dictionary else "decoder-input-output-embed"
    options = "\n".join(recipe.train_options)
    if not args.tokenize:
        options = options.replace("--eval-bleu-detok moses", "--eval-bleu-detok space")
    elif args.target_lang != "en":
        detok_args = shlex.quote(json.dumps({"target_lang": args.target_lang}))
        detok = f"--eval-bleu-detok moses --eval-bleu-detok-args {detok_args}"
        options = options.replace("--eval-bleu-detok moses", detok)
    lines = [
        f"fairseq-train {shlex.quote(str(args.out / 'data-bin'))}",
        f"--user-dir ea_fairseq --arch {recipe.arch} --share-{share}",
        "--optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --lr-scheduler inverse_sqrt",
        "--criterion label_smoothed_cross_entropy --label-smoothing 0.1",
        *options.split("\n"),
        f"--save-dir {shlex.quote(f'checkpoints/{args.out.name}')}",
    ]
    return " \\\n    ".join(lines)


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
    directions = {"iwslt14": ("de", "en"), "wmt14": ("en", "de"), "multi30k": ("de", "en")}
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
                choices=("de", "en") if name in ("iwslt14", "wmt14") else None,
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
    add("--raw", type=Path, help="folder of the official files or archives", **needed)
    if name == "wmt14":
        versions = "v12 (WMT'17) as in fairseq's recipe, v9 for WMT'14's own data"
        add("--news-commentary", choices=["v9", "v12"], default="v12", help=versions)
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
        sys.stdout.flush()
    except DataError as error:
        sys.exit(f"prepare.py: error: {error}")
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"prepare.py: error: {error.filename or args.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command goes on from the stage it was in")


if __name__ == "__main__":
    main()
