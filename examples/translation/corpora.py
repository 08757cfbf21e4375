"""Where the text comes from: finds, reads and checks the files of each recipe's corpora."""

from __future__ import annotations

import argparse
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from sentences import Pair
from stages import place_of, written_places

from evolving_attention.commands import DataError, text_lines


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a file, which may be gzipped, without their \\n. DataError if it is damaged or not
    UTF-8 text."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        try:
            yield from text_lines(gzip.GzipFile(fileobj=stream) if zipped else stream, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged or incomplete ({error}); get it again") from None


class Finder:
    """Finds files by name in a folder, at any depth; with or without .gz."""

    def __init__(self, raw: Path, out: Path) -> None:
        """out: the output folder, whose stages are not searched. DataError if raw is no folder."""
        if not raw.is_dir():
            raise DataError(
                f"{raw}: no such folder; unpack archives and give the folder they are in"
            )
        check_input(raw, out)
        places = written_places(out)
        self.raw = raw
        self.files: dict[str, list[Path]] = {}
        for path in sorted(raw.rglob("*")):
            if path.is_file() and not place_of(path, places):
                self.files.setdefault(path.name.removesuffix(".gz"), []).append(path)

    def find(self, *names: str) -> Path:
        """The one file by the first of these names that there is, with or without its folder.
        DataError if there is none, or more than one."""
        for name in names:
            paths = self.files.get(name.rpartition("/")[2], ())
            found = [path for path in paths if f"/{path}".removesuffix(".gz").endswith(f"/{name}")]
            if found:
                break
        else:
            raise DataError(f"{self.raw}: no {' or '.join(names)} in it; are archives unpacked?")
        if len(found) > 1:
            places = ", ".join(map(str, found))
            raise DataError(f"{self.raw}: more than one {name}, keep one of: {places}")
        return found[0]


def check_input(path: Path, out: Path) -> None:
    """DataError if a run with this --out would write where the path is."""
    if place := place_of(path, written_places(out)):
        raise DataError(
            f"{path} is in {place}, which --out {out} would write; move it, or give another --out"
        )


@dataclass(frozen=True)
class Corpus:
    """Two files of which sentence n of one translates sentence n of the other."""

    source: Path
    target: Path
    parse: Callable[[Iterable[str]], Iterator[str]] = iter  # lines of the file -> sentences

    def fingerprint(self) -> list[list[str | int | None]]:
        """What changes when a file does: place, bytes, nanoseconds."""
        stats = [(path, path.stat()) for path in (self.source, self.target)]
        # with the None the stamps of 0.1.0 stay valid
        return [[str(path.resolve()), None, x.st_size, x.st_mtime_ns] for path, x in stats]

    def pairs(self) -> Iterator[Pair]:
        """All pairs, white space made single spaces. DataError if there are none, or if one side
        has more sentences than the other."""
        counts = {self.source: 0, self.target: 0}
        sides = (self.parse(lines_of(path)) for path in (self.source, self.target))
        for source, target in zip_longest(*sides):
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
IWSLT14_TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def find_sets(args: argparse.Namespace) -> Sets:
    """The corpora of the subcommand. DataError where files are missing."""
    langs = args.source_lang, args.target_lang
    if args.command == "text":

        def corpus(prefix: str) -> Corpus:
            return Corpus(*(prefixed(prefix, lang, args.out) for lang in langs))

        sets = {"train": [corpus(prefix) for prefix in args.train]}
        if args.valid:
            sets["valid"] = [corpus(args.valid)]
        return sets | numbered([corpus(prefix)] for prefix in args.test)

    finder = Finder(args.raw, args.out)

    def corpus(*names: str, parse: Callable = iter) -> Corpus:
        """Its files by any of the names, in which {role} is src or ref and {lang} the language."""
        files = []
        for role, lang in zip(("src", "ref"), langs, strict=True):
            of_side = (name.replace("{role}", role).replace("{lang}", lang) for name in names)
            files.append(finder.find(*of_side))
        return Corpus(*files, parse)

    if args.command == "iwslt14":  # the test set is five dev and test sets, as in fairseq's script
        tests = ["IWSLT14." + name + ".de-en.{lang}.xml" for name in IWSLT14_TESTS]
        return {
            "train": [corpus("train.tags.de-en.{lang}", parse=parse_iwslt_train)],
            "test": [corpus(name, parse=parse_segments) for name in tests],
        }
    if args.command in ("wmt14", "wmt14-en-fr"):
        if args.command == "wmt14":
            of_news = f"news-commentary-{args.news_commentary}.de-en"
            names = ["europarl-v7.de-en", "commoncrawl.de-en", of_news]
            test = "newstest2014-deen-{role}.{lang}.sgm"
        else:
            names = ["europarl-v7.fr-en", "commoncrawl.fr-en", "undoc.2000.fr-en"]
            names += ["news-commentary-v9.fr-en", "giga-fren.release2.fixed"]
            test = "newstest2014-fren-{role}.{lang}.sgm"
        sets = {"train": [corpus(name + ".{lang}") for name in names]}
        if args.valid == "newstest2013":
            sets["valid"] = [corpus("newstest2013.{lang}")]
        # dev.tgz has the test set, too
        test = corpus(f"test-full/{test}", test, parse=parse_segments)
        return sets | {"test": [test]}
    tests = args.tests or multi30k_tests(finder, *langs)
    sets = {"train": [corpus("train.{lang}")], "valid": [corpus("val.{lang}", "valid.{lang}")]}
    return sets | numbered([corpus(name + ".{lang}")] for name in tests)


def numbered(tests: Iterable[list[Corpus]]) -> Sets:
    """The test sets under fairseq-preprocess' names: test, test1, test2, ..."""
    return {f"test{index or ''}": corpora for index, corpora in enumerate(tests)}


def multi30k_tests(finder: Finder, source: str, target: str) -> list[str]:
    """Names of the test sets that are there in both languages, in alphabetical order."""
    names = [name for name in finder.files if re.match(rf"test.*\.{source}$", name)]
    stems = (name.removesuffix(f".{source}") for name in names)
    tests = sorted(stem for stem in stems if f"{stem}.{target}" in finder.files)
    if not tests:
        raise DataError(f"{finder.raw}: no test set in it (test*.{source} with test*.{target})")
    return tests


def prefixed(prefix: str, lang: str, out: Path) -> Path:
    """PREFIX.de, or PREFIX.de.gz. DataError if there is none, or if `out` is written there."""
    paths = [Path(f"{prefix}.{lang}"), Path(f"{prefix}.{lang}.gz")]
    for path in paths:
        if path.is_file():
            check_input(path, out)
            return path
    raise DataError(f"{paths[0]}: no such file (nor {paths[1].name})")
