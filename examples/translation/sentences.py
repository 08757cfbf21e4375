"""Pairs of sentences: read and written, tokenised, cut by BPE, cleaned."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sacremoses import MosesPunctNormalizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE

Pair = tuple[str, str]

MAX_WORD_CHARS = 1000  # clean-corpus-n.perl drops pairs with longer words
SCRIPTS_WITHOUT_SPACES = "CJK HIRAGANA KATAKANA THAI LAO KHMER MYANMAR TIBETAN".split()


@contextmanager
def open_sides(prefix: Path, langs: tuple[str, str], mode: str) -> Iterator[list[TextIO]]:
    """The files prefix.SRC and prefix.TRG, one sentence a line."""
    options = {"encoding": "utf-8", "newline": "\n"}
    with ExitStack() as stack:
        yield [stack.enter_context(open(f"{prefix}.{lang}", mode, **options)) for lang in langs]


def read_pairs(prefix: Path, langs: tuple[str, str]) -> Iterator[Pair]:
    with open_sides(prefix, langs, "r") as files:
        for source, target in zip(*files, strict=True):
            yield source.rstrip("\n"), target.rstrip("\n")


def write_pairs(prefix: Path, langs: tuple[str, str], pairs: Iterable[Pair]) -> int:
    """Writes prefix.SRC and prefix.TRG; how many pairs there were."""
    prefix.parent.mkdir(exist_ok=True)
    count = 0
    with open_sides(prefix, langs, "w") as (source, target):
        for pair in pairs:
            source.write(pair[0] + "\n")
            target.write(pair[1] + "\n")
            count += 1
    return count


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


def clean(pairs: Iterable[Pair], limits: Limits, dropped: Counter[str]) -> Iterator[Pair]:
    """The pairs within the limits; counts the others by reason."""
    for pair in pairs:
        if reason := limits.reason_to_drop(pair):
            dropped[f"dropped ({reason})"] += 1
        else:
            yield pair


def has_no_spaces(text: str) -> bool:
    """Whether most of its letters are of scripts that put no spaces between words."""
    scripts = Counter(unicodedata.name(char, "").split(" ")[0] for char in text if char.isalpha())
    return 2 * sum(scripts[script] for script in SCRIPTS_WITHOUT_SPACES) > scripts.total()
