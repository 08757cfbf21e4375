"""make demo: its corpus, and the whole demo with a small model."""

import random
import re
import sys
from pathlib import Path

import pytest
from test_prepare import snapshot

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parent.parent / "examples/demo"
sys.path.insert(0, str(DEMO))
import corpus  # noqa: E402
import demo  # noqa: E402


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus.build(folder, seed=3, train=3000, valid=200, test=400)
    return folder


def test_no_sentence_stands_twice(built):
    for lang in ("de", "en"):
        sentences = [x for split in demo.SIZES for x in lines(built / f"{split}.{lang}")]
        assert len(sentences) == len(set(sentences)) == 3600


def test_all_is_spelled_out(built):
    for lang in ("de", "en"):
        for sentence in lines(built / f"train.{lang}"):
            assert sentence == " ".join(sentence.split())
            assert not any(character.isdigit() or character in "{}" for character in sentence)


def test_the_seed_alone_decides(built, tmp_path):
    corpus.build(tmp_path, seed=3, train=3000, valid=200, test=400)
    corpus.build(tmp_path / "other", seed=4, train=3000, valid=200, test=400)
    assert lines(tmp_path / "train.de") == lines(built / "train.de")
    assert lines(tmp_path / "other/train.de") != lines(built / "train.de")


@pytest.mark.parametrize(
    ("make", "german", "english"),
    [
        (lambda: corpus.in_words(24), "vierundzwanzig", "twenty-four"),
        (
            lambda: corpus.in_words(1998),
            "eintausendneunhundertachtundneunzig",
            "one thousand nine hundred and ninety-eight",
        ),
    ],
)
def test_numbers(make, german, english):
    assert make() == (german, english)


def test_words_of_both_languages_mean_the_same(built):
    """CLDR's names occur on one side exactly where they occur on the other."""
    names = {
        "Dienstag": "Tuesday",
        "März": "March",
        "Schweizer Franken": "Swiss francs",
        "Zentimeter": "centimeters",
        "Wochen": "weeks",
    }
    pairs = list(zip(lines(built / "train.de"), lines(built / "train.en"), strict=True))
    for german, english in names.items():
        assert sum(german in pair[0] for pair in pairs) > 10
        assert all((german in pair[0]) == (english in pair[1]) for pair in pairs)


def test_hours():
    rng = random.Random(0)
    said = {corpus.clock(rng) for _ in range(20_000)}
    assert len(said) == 24 * 50
    assert ("vierzehn Uhr dreißig", "two thirty in the afternoon") in said
    assert ("null Uhr zehn", "twelve ten in the morning") in said
    assert ("ein Uhr elf", "one eleven in the morning") in said


def test_the_whole_demo_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SIZES", {"train": 600, "valid": 20, "test": 8})
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "x"), "--max-update", "6"])
    demo.main()
    printed = capsys.readouterr().out
    assert "sacreBLEU" in printed
    assert "exact match" in printed
    assert printed.count("  ours    ") >= 4
    assert "| decoder.layers.1.encoder_attn |" in printed
    assert not re.search(r"DEBUG|INFO|[Ww]arning", printed)
    for name in ("checkpoints/checkpoint_best.pt", "train.log", "maps-encoder-decoder.png"):
        assert str(tmp_path / "x" / name) in printed
        assert (tmp_path / "x" / name).stat().st_size > 1000

    # Again: the same output, and nothing is trained or translated a second time.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "x/checkpoints").iterdir()}
    demo.main()
    assert "sacreBLEU" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "x/checkpoints").iterdir()}
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "x"), "--max-update", "9"])
    with pytest.raises(SystemExit, match="other settings"):
        demo.main()


@pytest.mark.parametrize("name", ["thesis.txt", "raw", "trained", "train.log", "checkpoints"])
def test_a_folder_of_somebody_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("theirs")
    for mark in (False, True):
        if mark:
            (tmp_path / "demo.json").write_text('["theirs"]')
        before = snapshot(tmp_path)
        monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match="give another --out"):
            demo.main()
        assert snapshot(tmp_path) == before


def test_the_corpus_is_written_beside_the_users_files_only(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("theirs")
    (tmp_path / "valid.en").write_text("theirs")
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, "argv", ["corpus.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        corpus.main()
    assert "valid.en already exists" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    sizes = ["--train", "9", "--valid", "2", "--test", "2"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite", *sizes])
    corpus.main()
    assert len(lines(tmp_path / "valid.en")) == 2 and len(list(tmp_path.iterdir())) == 7


def test_no_two_sentences_are_alike_in_the_demo_itself(tmp_path):
    """At full size, and ignoring case, punctuation and spaces."""
    corpus.build(tmp_path, seed=1, **demo.SIZES)
    for lang in ("de", "en"):
        seen = set()
        for name in demo.SIZES:
            seen |= {re.sub(r"\W", "", x.casefold()) for x in lines(tmp_path / f"{name}.{lang}")}
        assert len(seen) == sum(demo.SIZES.values())


@pytest.mark.parametrize("wrong", [[], [2], [5], [1, 6]])
def test_every_pair_is_shown_once(tmp_path, capsys, wrong):
    corpus.build(tmp_path / "raw", seed=1, train=1, valid=1, test=8)
    references = lines(tmp_path / "raw" / "test.en")
    ours = [f"{x}{' indeed' * (i in wrong)}" for i, x in enumerate(references)]
    demo.show(tmp_path, ours)
    shown = re.findall("German  (.*)", capsys.readouterr().out)
    german = lines(tmp_path / "raw" / "test.de")
    assert shown == [german[i] for i in sorted({0, 1, 2, 3, *wrong[:1]})]
