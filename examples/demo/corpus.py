#!/usr/bin/env python3
"""Generates a German-English corpus: numbers, dates, times, money and measures in words.

num2words spells the numbers, and babel (Unicode's CLDR) has the names of weekdays, months,
currencies and units in both languages; a few carrier phrases connect them. The task is small but
real: German puts units before tens, in one word (vierundzwanzig, twenty-four), has a different word
order, and counts hours to twenty-four.

    python examples/demo/corpus.py --out FOLDER
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

from babel import Locale
from babel.numbers import get_currency_name
from babel.units import format_unit
from num2words import num2words

from evolving_attention.commands import (
    add_overwrite,
    check_output,
    positive,
    whole_or_not_at_all,
)

Pair = tuple[str, str]  # German, English

LOCALES = {lang: Locale(lang) for lang in ("de", "en")}
FIRST_DAY, DAYS = date(1900, 1, 1), 73_000  # to 2099
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK", "DKK", "PLN", "CZK", "INR", "TRY", "BRL")
LENGTHS = ("length-kilometer", "length-meter", "length-centimeter", "length-mile")
WEIGHTS = ("mass-kilogram", "mass-gram", "mass-pound")
DURATIONS = ("duration-second", "duration-minute", "duration-hour", "duration-day", "duration-week")


def number(rng: random.Random) -> int:
    """2 to 999,999; every number of digits is equally likely."""
    return rng.randrange(2, 10 ** rng.randint(1, 6))


def in_words(value: int) -> Pair:
    # num2words puts commas into large English numbers, which are not spoken.
    return num2words(value, lang="de"), num2words(value, lang="en").replace(",", "")


def measure(rng: random.Random, units: tuple[str, ...]) -> Pair:
    """Such as (vierzig Kilometer, forty kilometers)."""
    value, unit = number(rng), rng.choice(units)
    words = []
    for lang, spelled in zip(LOCALES, in_words(value), strict=True):
        # The name of the unit in the plural, without the figure.
        name = format_unit(2, unit, length="long", locale=LOCALES[lang]).replace("2", "").strip()
        words.append(f"{spelled} {name}")
    return words[0], words[1]


def money(rng: random.Random) -> Pair:
    """Such as (neun Schweizer Franken, nine Swiss francs)."""
    value, code = number(rng), rng.choice(CURRENCIES)
    names = [get_currency_name(code, count=value, locale=locale) for locale in LOCALES.values()]
    german, english = in_words(value)
    return f"{german} {names[0]}", f"{english} {names[1]}"


def day(rng: random.Random) -> Pair:
    """Such as (Dienstag, dem dritten März ..., Tuesday the third of March ...)."""
    chosen = FIRST_DAY + timedelta(days=rng.randrange(DAYS))
    weekday, month = [], []
    for locale in LOCALES.values():
        weekday.append(locale.days["format"]["wide"][chosen.weekday()])
        month.append(locale.months["format"]["wide"][chosen.month])
    ordinal = num2words(chosen.day, lang="de", to="ordinal") + "n"  # dative
    year = num2words(chosen.year, lang="de", to="year")
    german = f"{weekday[0]}, dem {ordinal} {month[0]} {year}"
    ordinal = num2words(chosen.day, lang="en", to="ordinal")
    year = num2words(chosen.year, lang="en", to="year")
    return german, f"{weekday[1]} the {ordinal} of {month[1]} {year}"


def clock(rng: random.Random) -> Pair:
    """Such as (vierzehn Uhr dreißig, two thirty in the afternoon)."""
    hour, minute = rng.randrange(24), rng.randrange(10, 60)
    german = f"{num2words(hour, lang='de') if hour != 1 else 'ein'} Uhr {in_words(minute)[0]}"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    return german, f"{in_words((hour - 1) % 12 + 1)[1]} {in_words(minute)[1]} {part}"


def plain_number(rng: random.Random) -> Pair:
    return in_words(number(rng))


def lengths(rng: random.Random) -> Pair:
    return measure(rng, LENGTHS)


def weights(rng: random.Random) -> Pair:
    return measure(rng, WEIGHTS)


def durations(rng: random.Random) -> Pair:
    return measure(rng, DURATIONS)


# A carrier phrase in both languages, and what fills its slots, in the German order.
PHRASES: list[tuple[str, str, list[Callable[[random.Random], Pair]]]] = [
    ("{0}", "{0}", [plain_number]),
    ("das kostet {0}", "that costs {0}", [money]),
    ("es ist {0}", "it is {0}", [clock]),
    ("am {0}", "on {0}", [day]),
    ("am {0} um {1}", "at {1} on {0}", [day, clock]),
    ("{0} lang sind wir {1} gelaufen", "we have walked {1} for {0}", [durations, lengths]),
    ("{0} für {1} ist zu viel", "{0} is too much for {1}", [money, weights]),
    ("um {0} hat er {1} bezahlt", "he paid {1} at {0}", [clock, money]),
    ("{0} lang hat sie {1} getragen", "she carried {1} for {0}", [durations, weights]),
]


def sentence(rng: random.Random) -> Pair:
    german, english, slots = rng.choice(PHRASES)
    filled = [slot(rng) for slot in slots]
    return german.format(*(x[0] for x in filled)), english.format(*(x[1] for x in filled))


def normalized(text: str) -> str:
    """Only the letters and digits, in lower case, so that nothing else tells sentences apart."""
    return "".join(char for char in text.lower() if char.isalnum())


def build(
    out: Path, seed: int, train: int, valid: int, test: int, overwrite: bool = False
) -> dict[str, int]:
    """Writes train, valid and test pairs to `out`: train.de, train.en, ..., one sentence a line.

    No sentence, German or English, occurs twice in the corpus, whatever its case and punctuation,
    so no sentence of the test set is seen in training. Returns the number of pairs of each set.
    FileExistsError if one of the files is there already, unless `overwrite`.
    """
    rng = random.Random(seed)
    sizes = {"test": test, "valid": valid, "train": train}
    seen: set[str] = set()
    out.mkdir(parents=True, exist_ok=True)
    for name in sizes:
        for lang in LOCALES:
            check_output(out / f"{name}.{lang}", overwrite)
    for name, size in sizes.items():
        pairs: list[Pair] = []
        while len(pairs) < size:
            pair = sentence(rng)
            words = [normalized(side) for side in pair]
            if seen.isdisjoint(words):
                seen.update(words)
                pairs.append(pair)
        for lang, lines in zip(LOCALES, zip(*pairs, strict=True), strict=True):
            text = "".join(f"{line}\n" for line in lines)
            with whole_or_not_at_all(out / f"{name}.{lang}", overwrite) as part:
                part.write_text(text, encoding="utf-8", newline="\n")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=positive, default=12_000, help="pairs")
    parser.add_argument("--valid", type=positive, default=500, help="pairs")
    parser.add_argument("--test", type=positive, default=1_000, help="pairs")
    add_overwrite(parser)
    args = parser.parse_args()
    try:
        print(build(**vars(args)))
    except OSError as error:
        parser.error(f"--out: {error}")


if __name__ == "__main__":
    main()
