"""examples/translation/prepare.py, on small files in the official formats."""

import gzip
import importlib.util
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest
from fairseq.data import Dictionary, data_utils, encoders

from evolving_attention import commands

SCRIPT = Path(__file__).parents[1] / "examples" / "translation" / "prepare.py"
STAGES = ["raw", "tok", "split", "code", "bpe", "data-bin"]
sys.path.insert(0, str(SCRIPT.parent))
import corpora  # noqa: E402

spec = importlib.util.spec_from_file_location("prepare_translation", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = prepare
spec.loader.exec_module(prepare)

# ------------------------------------------------------------------------ data and helpers


def corpus(count, seed=0):
    """Pairs of 4 to 6 words per side, all different, which cleaning does not drop."""
    rng = random.Random(seed)

    def side(words, number):
        chosen = rng.choices(words, k=rng.randint(3, 4))
        return f"{' '.join(chosen).capitalize()} {seed}{number:03}."

    german = ["der", "hund", "katze", "läuft", "über", "straße", "grün", "groß"]
    english = ["the", "dog", "cat", "runs", "over", "street", "green", "big"]
    return [(side(german, number), side(english, number)) for number in range(count)]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_pairs(prefix, pairs, ending=""):
    for lang, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
        write_lines(prefix.with_name(f"{prefix.name}.{lang}{ending}"), lines)


def lines_of(path):
    """Lines as fairseq reads them, with Python's universal newlines."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def pairs_of(folder, name):
    return list(zip(*(lines_of(folder / f"{name}.{lang}") for lang in ("de", "en")), strict=True))


def run(*options):
    prepare.main([str(option) for option in options])


@pytest.fixture
def data(tmp_path):
    """A folder with train (60 pairs), valid (8) and test (5)."""
    for name, count in (("train", 60), ("valid", 8), ("test", 5)):
        write_pairs(tmp_path / name, corpus(count, seed=len(name)))
    return tmp_path


def text_options(folder, *more, out="out"):
    options = ["text", "--source-lang", "de", "--target-lang", "en", "--train", folder / "train"]
    return [*options, "--out", folder / out, "--workers", 1, "--bpe-merges", 40, *more]


def run_text(folder, *more, out="out"):
    """Runs everything but fairseq-preprocess on the files of `data`; returns the output folder."""
    sets = ["--valid", folder / "valid", "--test", folder / "test"]
    run(*text_options(folder, *sets, "--no-binarize", *more, out=out))
    return folder / out


def error_of(capsys, call, *args):
    """The one-line message with which the call exits."""
    with pytest.raises(SystemExit) as exit_info:
        call(*args)
    code = exit_info.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err.split("\n")[-2]
    assert code != 0 and message.startswith("prepare.py") and "\n" not in message
    return message


# ------------------------------------------------------------------ IWSLT'14, through fairseq

XML = """<?xml version="1.0" encoding="UTF-8"?>
<mteval>
<doc docid="1"><url>http://www.ted.com</url><title>A title that is no segment</title>
{segments}
</doc>
</mteval>"""


def segments(sentences):
    lines = [f'<seg id="{i}"> {sentence} </seg>' for i, sentence in enumerate(sentences, 1)]
    return XML.format(segments="\n".join(lines))


def make_iwslt14(folder):
    """The files of de-en.tgz as published; the pairs in them, to train on and to test with."""
    sets = {name: corpus(3, seed) for seed, name in enumerate(corpora.IWSLT14_TESTS, 10)}
    sets["TED.dev2010"][0] = ("Das war\u2019s &amp; mehr.", "That\u2019s &amp; so much.")
    train = corpus(69)
    train[2] = ("Das war\u2019s nun eins-zwei.", "That\u2019s it now one-two.")
    for side, lang in enumerate(("de", "en")):
        lines = [pair[side] for pair in train]
        lines[0] = f"<title>{lines[0]}</title>"
        lines[1] = f"<description>{lines[1]}</description>"
        tags = ["<url>http://x</url>", "<keywords>a, b</keywords>", "<talkid>1</talkid>"]
        write_lines(folder / "de-en" / f"train.tags.de-en.{lang}", tags + lines)
        for name, pairs in sets.items():
            text = segments([pair[side] for pair in pairs])
            write_lines(folder / "de-en" / f"IWSLT14.{name}.de-en.{lang}.xml", [text])
    return train, [pair for pairs in sets.values() for pair in pairs]


@pytest.fixture(scope="module")
def iwslt14(tmp_path_factory):
    """A run of the script, as a user runs it, with two workers and fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("iwslt14, with a comma")
    train, tests = make_iwslt14(folder / "orig")
    command = [sys.executable, SCRIPT, "iwslt14", "--raw", folder / "orig"]
    command += ["--out", folder / "out", "--workers", "2", "--bpe-merges", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder / "out", train, tests, done


@pytest.mark.slow
def test_iwslt14_reads_what_fairseq_does(iwslt14):
    out, train, tests, _ = iwslt14
    assert pairs_of(out / "raw", "train") == train
    assert pairs_of(out / "raw", "test") == tests


@pytest.mark.slow
def test_iwslt14_tokenises_lower_cases_and_splits(iwslt14):
    out, train, _, _ = iwslt14
    # the recipe straightens the test text's apostrophes and leaves its &amp; as it is
    assert lines_of(out / "tok" / "test.de")[0] == "das war &apos; s &amp; amp ; mehr ."
    assert lines_of(out / "tok" / "test.en")[0] == "that &apos;s &amp; amp ; so much ."
    tokens = pairs_of(out / "tok", "train")
    # the training text's apostrophes are left alone, and its hyphens
    assert tokens[2] == ("das war \u2019 s nun eins-zwei .", "that \u2019 s it now one-two .")
    train = [tuple(side.lower().replace(".", " .") for side in pair) for pair in train]
    assert tokens[3:] == train[3:]
    assert pairs_of(out / "split", "valid") == tokens[22::23]
    assert len(pairs_of(out / "split", "train")) == 66


@pytest.mark.slow
def test_fairseq_reads_back_the_same_pairs_with_one_dictionary(iwslt14):
    out = iwslt14[0]
    data_bin = out / "data-bin"
    assert (data_bin / "dict.de.txt").read_bytes() == (data_bin / "dict.en.txt").read_bytes()
    dictionary = Dictionary.load(str(data_bin / "dict.de.txt"))
    for name in ("train", "valid", "test"):
        for lang in ("de", "en"):
            path = data_bin / f"{name}.de-en.{lang}"
            dataset = data_utils.load_indexed_dataset(str(path), dictionary)
            lines = lines_of(out / "bpe" / f"{name}.{lang}")
            known = [" ".join(w if w in dictionary else "<unk>" for w in x.split()) for x in lines]
            assert [dictionary.string(sentence) for sentence in dataset] == known


@pytest.mark.slow
def test_fairseqs_own_encoders_make_the_same_text(iwslt14):
    """fairseq-interactive processes a sentence as the training text was processed."""
    out = iwslt14[0]
    options = {"source_lang": "de", "moses_no_dash_splits": True, "bpe_codes": str(out / "code")}
    args = Namespace(tokenizer="moses", bpe="subword_nmt", **options)
    tokenizer, bpe = encoders.build_tokenizer(args), encoders.build_bpe(args)
    raw = lines_of(out / "raw" / "test.de")[1:]  # the first one's apostrophe is straightened
    encoded = [bpe.encode(tokenizer.encode(line).lower()) for line in raw]
    assert encoded == lines_of(out / "bpe" / "test.de")[1:]
    assert any("@@" in line for line in encoded)


@pytest.mark.slow
def test_the_report_names_stages_test_sets_and_the_training_command(iwslt14):
    out, _, _, done = iwslt14
    assert [line.split()[0] for line in done.stdout.split("\n")[:6]] == STAGES
    assert "split    train 66, valid 3\n" in done.stdout
    command = shlex.split(done.stdout.split("Train with:")[1])
    assert command[:2] == ["fairseq-train", str(out / "data-bin")]
    options = dict(pairwise(command))
    assert options["--user-dir"] == "ea_fairseq"
    assert options["--arch"] == "ea_transformer_iwslt_de_en"
    assert "--share-all-embeddings" in command
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["iwslt14", "wmt14", "wmt14-en-fr", "multi30k"])
def test_the_readme_has_the_printed_training_command(name):
    options = [name, "--raw", "orig", "--out", f"data/{name}"]
    command = prepare.train_command(prepare.build_parser().parse_args(options))
    assert command in SCRIPT.with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--source-lang", "en", "--target-lang", "de"], """-args '{"target_lang": "de"}'"""),
        (["--no-tokenize"], "--eval-bleu-detok space"),
        (["--no-joined-dictionary"], "--share-decoder-input-output-embed"),
        (["--out", "my data"], "fairseq-train 'my data/data-bin'"),
    ],
)
def test_the_printed_training_command_follows_the_options(options, part):
    defaults = ["multi30k", "--raw", "orig", "--out", "data"]
    plain = prepare.train_command(prepare.build_parser().parse_args(defaults))
    changed = prepare.train_command(prepare.build_parser().parse_args(defaults + options))
    assert part in changed and part not in plain


@pytest.mark.slow
def test_separate_dictionaries_redo_only_the_last_stage(iwslt14, capsys):
    out = iwslt14[0]
    options = ["--workers", 2, "--bpe-merges", 60, "--no-joined-dictionary"]
    run("iwslt14", "--raw", out.parent / "orig", "--out", out, *options)
    assert redone(capsys.readouterr().out) == ["data-bin"]
    dictionaries = [Dictionary.load(str(out / "data-bin" / f"dict.{x}.txt")) for x in ("de", "en")]
    assert dictionaries[0].symbols != dictionaries[1].symbols


# ------------------------------------------------------------------------ WMT'14 and Multi30k

QUOTED = ("„Ja\u00ad“ \u2013 sagt Karl-Heinz", "“Yes\x07” \u2013 says Karl-Heinz")
LOPSIDED = ("kurz", "a far too long translation of it")


@pytest.fixture
def wmt14(tmp_path):
    """The extracted corpora; newstest2014 in .sgm files, each language as source and reference."""
    corpora = {"europarl-v7": 1, "commoncrawl": 2, "news-commentary-v12": 3}
    pairs = {name: corpus(30, seed) for name, seed in corpora.items()}
    pairs["commoncrawl"][:2] = [QUOTED, LOPSIDED]
    for name, part in pairs.items():
        write_pairs(tmp_path / "orig" / "training" / f"{name}.de-en", part)
    write_pairs(tmp_path / "orig" / "dev" / "newstest2013", [LOPSIDED, *corpus(4, 5)])
    for number, role in enumerate(("src", "ref")):
        tests = [
            ("„Nein“, sagt\u2019s Karl-Heinz &amp; Co", f"“No{number}”, it\u2019s said"),
            LOPSIDED,
        ]
        for lang, sentences in zip(("de", "en"), zip(*tests, strict=True), strict=True):
            name = f"newstest2014-deen-{role}.{lang}.sgm"
            write_lines(tmp_path / "orig" / "test-full" / name, [segments(sentences)])
            write_lines(tmp_path / "orig" / "dev" / name, [segments(["of dev.tgz", "no"])])
    return tmp_path


def run_wmt14(folder, *more):
    options = ["--raw", folder / "orig", "--out", folder / "out", "--workers", 1]
    run("wmt14", *options, "--no-binarize", "--bpe-merges", 30, "--max-length", 60, *more)
    return folder / "out"


def test_wmt14_normalises_the_training_text_only(wmt14):
    out = run_wmt14(wmt14, "--valid-every", 10)
    assert len(lines_of(out / "raw" / "train.de")) == 90
    tokens = pairs_of(out / "tok", "train")
    assert tokens[30][0] == "&quot; Ja &quot; - sagt Karl @-@ Heinz"
    assert tokens[30][1] == "&quot; Yes &quot; - says Karl @-@ Heinz"
    assert lines_of(out / "tok" / "test.de")[0].startswith(
        "„ Nein “ , sagt &apos; s Karl @-@ Heinz"
    )


def test_wmt14_splits_first_and_cleans_after_bpe(wmt14, capsys):
    out = run_wmt14(wmt14, "--valid-every", 32, "--ratio", 3)  # LOPSIDED is line 32
    tokens = pairs_of(out / "tok", "train")
    assert pairs_of(out / "split", "valid") == [tokens[31], tokens[63]]
    assert tokens[31] == LOPSIDED
    assert len(pairs_of(out / "split", "train")) == len(pairs_of(out / "bpe", "train")) == 88
    assert len(pairs_of(out / "bpe", "valid")) == 1
    assert "train 88, valid 1, test 2, dropped (length ratio above 3) 1" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "target", "number"), [("en", "de", 0), ("de", "en", 1)])
def test_wmt14_takes_the_test_file_of_the_direction(wmt14, source, target, number):
    out = run_wmt14(wmt14, "--source-lang", source, "--target-lang", target, "--valid-every", 10)
    assert lines_of(out / "raw" / "test.en")[0] == f"“No{number}”, it\u2019s said"


def test_wmt14_en_fr(tmp_path):
    names = ("europarl-v7.fr-en", "commoncrawl.fr-en", "undoc.2000.fr-en")
    names += ("news-commentary-v9.fr-en", "giga-fren.release2.fixed")
    for seed, name in enumerate(names):
        for lang, text in zip(("fr", "en"), zip(*corpus(300, seed), strict=True), strict=True):
            write_lines(tmp_path / "orig" / f"{name}.{lang}", text)
    for lang in ("fr", "en"):
        for role in ("src", "ref"):
            path = tmp_path / "orig" / f"newstest2014-fren-{role}.{lang}.sgm"
            write_lines(path, [segments([f"{role} of {lang}"])])
    run(
        *("wmt14-en-fr", "--raw", tmp_path / "orig", "--out", tmp_path / "out", "--workers", 1),
        *("--no-binarize", "--bpe-merges", 30),
    )
    out = tmp_path / "out"
    assert [lines_of(out / "raw" / f"test.{lang}") for lang in ("en", "fr")] == [
        ["src of en"],
        ["ref of fr"],
    ]
    source, target = corpus(300, 4)[0]  # giga-fren is the last one
    assert lines_of(out / "raw" / "train.fr")[1200] == source
    assert lines_of(out / "raw" / "train.en")[1200] == target
    tokens = [lines_of(out / "tok" / f"train.{lang}")[1332] for lang in ("en", "fr")]
    assert [lines_of(out / "split" / f"valid.{lang}") for lang in ("en", "fr")] == [
        [tokens[0]],
        [tokens[1]],
    ]


def test_wmt14_with_newstest2013_and_other_news_commentary(wmt14):
    for path in (wmt14 / "orig" / "training").glob("news-commentary-v12*"):
        path.rename(path.with_name(path.name.replace("v12", "v9")))
    out = run_wmt14(wmt14, "--news-commentary", "v9", "--valid", "newstest2013")
    assert pairs_of(out / "raw", "valid") == [LOPSIDED, *corpus(4, 5)]
    assert len(pairs_of(out / "split", "train")) == 90
    assert [len(pairs_of(out / "bpe", name)) for name in ("valid", "test")] == [5, 2]


@pytest.fixture
def multi30k(tmp_path):
    for name, count in (("train", 40), ("val", 6), ("test_2017_x", 3), ("test_2016_x", 2)):
        write_pairs(tmp_path / name, corpus(count, seed=count), ending=".gz")
    write_lines(tmp_path / "test_2018_x.de", ["nur deutsch"])  # as that set was published
    return tmp_path


def run_multi30k(folder, *more):
    options = ["--raw", folder, "--out", folder / "out", "--workers", 1, "--bpe-merges", 20]
    run("multi30k", *options, "--no-binarize", *more)
    return folder / "out"


def test_data_in_the_working_directory(multi30k, monkeypatch):
    monkeypatch.chdir(multi30k)
    out = run_multi30k(Path("."))
    assert pairs_of(out / "raw", "train") == corpus(40, 40)


def test_multi30k_numbers_the_test_sets(multi30k, capsys):
    out = run_multi30k(multi30k)
    assert pairs_of(out / "raw", "test") == corpus(2, 2)
    assert pairs_of(out / "raw", "test1") == corpus(3, 3)
    assert pairs_of(out / "raw", "valid") == corpus(6, 6)
    assert len(pairs_of(out / "split", "train")) == 40 and not (out / "split" / "valid.de").exists()
    assert lines_of(out / "tok" / "train.en")[0].islower()
    assert f"--gen-subset test1: {multi30k}/test_2017_x.de.gz" in capsys.readouterr().out
    run_multi30k(multi30k, "--tests", "test_2017_x")  # --out lies in --raw and is not searched
    assert pairs_of(out / "raw", "test") == corpus(3, 3)
    assert not (out / "raw" / "test1.de").exists()


# ------------------------------------------------------------------------ lines stay aligned


def test_only_newlines_end_a_line(tmp_path):
    """The characters that str.splitlines or a text-mode open() break at are inside sentences."""
    breaks = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"]
    pairs = corpus(60)
    broken = [
        (f"{de[:5]}{char}{de[5:]}", en) for (de, en), char in zip(pairs, breaks, strict=False)
    ]
    write_pairs(tmp_path / "train", broken + pairs[len(breaks) :])
    for options in ([], ["--no-tokenize"]):
        run(*text_options(tmp_path, "--no-binarize", *options))
        for stage in ("raw", "tok"):
            read = pairs_of(tmp_path / "out" / stage, "train")
            assert [en.replace(" .", ".") for _, en in read] == [en for _, en in pairs]
            assert [line for line, _ in read if line.splitlines() != [line]] == []
        assert lines_of(tmp_path / "out" / "raw" / "train.de")[0] == " ".join(broken[0][0].split())


def test_byte_order_mark_and_carriage_returns_go(data):
    plain = (data / "test.de").read_bytes()
    (data / "test.de").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n").rstrip())
    assert (run_text(data) / "raw" / "test.de").read_bytes() == plain


def test_workers_change_nothing(data, monkeypatch):
    monkeypatch.setattr(commands, "BLOCK", 2)
    alone = {path: path.read_bytes() for path in run_text(data).rglob("*.??")}
    together = run_text(data, "--workers", 2, out="together")
    assert len(alone) == 20
    for path, content in alone.items():
        assert (together / path.relative_to(data / "out")).read_bytes() == content


# --------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("a b", "c d"), None),
        (("", "c d"), "empty"),
        (("a b", ""), "empty"),
        (("a", "c"), "shorter than 2"),
        (("a b c", "d e"), None),  # exactly 1.5
        (("a b c d", "e f"), "length ratio above 1.5"),
        (("a b c d e f", "a b c d e"), "longer than 5"),
        (("a b c d e", "a b c d e"), None),
        (("a b", f"c {'d' * 1000}"), None),
        (("a b", f"c {'d' * 1001}"), "word above 1000 characters"),
    ],
)
def test_cleaning_keeps_what_moses_keeps(pair, reason):
    limits = prepare.Limits(min_length=2, max_length=5, ratio=1.5)
    assert limits.reason_to_drop(pair) == reason
    assert limits.reason_to_drop(pair[::-1]) == reason


def test_only_training_pairs_are_cleaned(data, capsys):
    unfit = [("", "nothing"), ("eins", "a b c d e f"), ("x " * 200, "y " * 200)]
    for name in ("train", "valid", "test"):
        write_pairs(data / name, unfit + corpus(40, len(name)))
    out = run_text(data)
    assert pairs_of(out / "raw", "test")[:2] == unfit[:2]
    for stage in ("raw", "tok", "bpe"):
        assert [len(pairs_of(out / stage, name)) for name in ("valid", "test")] == [43, 43]
    assert len(pairs_of(out / "bpe", "train")) == 40
    report = "train 40, dropped (empty) 1, dropped (length ratio above 1.5) 1, dropped (longer"
    assert report in capsys.readouterr().out


def test_cleaning_comes_before_the_split(data):
    pairs = corpus(60)
    pairs.insert(4, ("eins", "a b c d e f"))
    write_pairs(data / "train", pairs)
    run(*text_options(data, "--no-binarize", "--valid-every", 10, "--no-tokenize"))
    assert pairs_of(data / "out" / "split", "valid") == corpus(60)[9::10]


def test_case_and_tokens_are_kept_where_asked_for(data):
    assert lines_of(run_text(data) / "tok" / "test.de")[0][0].isupper()
    assert lines_of(run_text(data, "--lowercase") / "tok" / "test.de")[0].islower()
    raw = lines_of(data / "out" / "raw" / "test.de")
    assert lines_of(run_text(data, "--no-tokenize") / "tok" / "test.de") == raw


# ----------------------------------------------------------------------- reruns, interruptions


def redone(output):
    """The stages that a run's output says it did."""
    lines = [line for line in output.split("\n") if line.split(" ")[0] in STAGES]
    return [line.split()[0] for line in lines if "skipped" not in line]


def touch_train(folder):
    os.utime(folder / "train.de", ns=(0, 0))


def remove_tokens(folder):
    (folder / "out" / "tok" / "train.en").unlink()


def remove_code(folder):
    (folder / "out" / "code").unlink()


@pytest.mark.parametrize(
    ("options", "change", "expected"),
    [
        ([], None, []),
        (["--workers", 2], None, []),
        (["--bpe-merges", 20], None, ["code", "bpe"]),
        (["--max-length", 99], None, ["split", "code", "bpe"]),
        (["--lowercase"], None, ["tok", "split", "code", "bpe"]),
        ([], touch_train, ["raw", "tok", "split", "code", "bpe"]),
        ([], remove_tokens, ["tok"]),
        ([], remove_code, ["code"]),
    ],
)
def test_a_rerun_does_what_has_changed(data, capsys, options, change, expected):
    out = run_text(data)
    before = {stage: (out / stage).stat().st_ctime_ns for stage in STAGES[:-1]}
    kept = {path: path.read_bytes() for path in out.rglob("*.??")}
    assert redone(capsys.readouterr().out) == STAGES[:-1]
    if change:
        change(data)
    run_text(data, *options)
    assert redone(capsys.readouterr().out) == expected
    after = {stage: (out / stage).stat().st_ctime_ns for stage in STAGES[:-1]}
    assert [stage for stage in STAGES[:-1] if before[stage] != after[stage]] == expected
    if not options:
        assert {path: path.read_bytes() for path in out.rglob("*.??")} == kept


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_an_interrupted_stage_is_done_again(data, capsys, monkeypatch, stage):
    """Interrupted while writing its last file; nothing unfinished is taken for finished."""
    reference = run_text(data, "--lowercase", out="reference")
    out = run_text(data)  # an earlier result, with other options, is in the way too

    method = f"build_{stage}"
    build = getattr(prepare.Preparation, method)

    def interrupted(self, part):
        build(self, part)
        last = max(part.rglob("*.??")) if part.is_dir() else part
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
        raise KeyboardInterrupt

    if stage == "raw":
        touch_train(data)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Preparation, method, interrupted)
        assert "interrupted" in error_of(capsys, run_text, data, "--lowercase")
    capsys.readouterr()
    run_text(data, "--lowercase")
    assert redone(capsys.readouterr().out) == STAGES[STAGES.index(stage) : -1]
    files = {path.relative_to(reference) for path in reference.rglob("*.??")}
    assert files == {path.relative_to(out) for path in out.rglob("*.??")}
    for path in [*files, "code"]:
        assert (out / path).read_bytes() == (reference / path).read_bytes()


# -------------------------------------------------------------- nothing of the user's is touched


def snapshot(folder):
    """The content of a folder: bytes of files, targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def refused(capsys, folder, call, *args):
    """The message of a call that must end before it has changed anything in the folder."""
    before = snapshot(folder)
    message = error_of(capsys, call, *args)
    assert snapshot(folder) == before
    return message


def as_file(path):
    path.write_text("theirs")


def as_folder(path):
    write_lines(path / "deep" / "notes.txt", ["theirs"])
    write_lines(path / "train.de", ["theirs"])


def as_link(path):
    as_folder(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def as_empty_folders(path):
    (path / "album").mkdir(parents=True)


@pytest.fixture
def run_any(data, tmp_path):
    """run_any(command, out): one of the commands, with its data in `data`."""
    make_iwslt14(tmp_path / "ted")
    raw = tmp_path / "wmt"
    for name in ("europarl-v7", "commoncrawl", "news-commentary-v12"):
        write_pairs(raw / f"{name}.de-en", corpus(30))
    for lang in ("de", "en"):
        for role in ("src", "ref"):
            write_lines(raw / f"newstest2014-deen-{role}.{lang}.sgm", [segments(["a b c"])])
    for lang in ("de", "en"):
        (tmp_path / f"val.{lang}").write_bytes((tmp_path / f"valid.{lang}").read_bytes())
    options = {
        "iwslt14": ["--raw", tmp_path / "ted"],
        "wmt14": ["--raw", raw, "--valid-every", 10],
        "multi30k": ["--raw", tmp_path],
        "text": text_options(tmp_path)[1:7],
    }
    options["multi30k"] = ["--raw", tmp_path / "flickr"]
    for name in ("train", "val", "test"):
        write_pairs(tmp_path / "flickr" / name, corpus(40, len(name)))

    def run_it(command, out, *more):
        more = ["--no-binarize", "--workers", 1, "--bpe-merges", 30, *more]
        run(command, *options[command], "--out", out, *more)

    return run_it


COMMANDS = ["iwslt14", "wmt14", "multi30k", "text"]


@pytest.mark.parametrize("kind", [as_file, as_folder, as_link, as_empty_folders])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_stands_where_a_stage_is_written_stays(tmp_path, run_any, capsys, command, kind):
    for name in STAGES:
        out = tmp_path / f"project {name}"
        write_lines(out / "thesis.tex", ["theirs"])
        kind(out / name)
        more = ["--binarize"] if name == "data-bin" else []
        message = refused(capsys, tmp_path, run_any, command, out, *more)
        assert f"will not overwrite {out / name}" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_full_of_somebodys_files(tmp_path, run_any, command):
    """Everything else in --out, whatever its name, is unchanged afterwards."""
    out = tmp_path / "project"
    for name in (*STAGES, *prepare.RECIPES, "train", "checkpoints", ".stamps-of-mine"):
        as_folder(out / f"{name}.part")
        as_folder(out / f".{name}")
    for name in ("code.json", "raw.json", "train.de", "dict.de.txt", "preprocess.log", ".lock"):
        as_file(out / name)
    before = snapshot(out)
    for _ in range(2):
        run_any(command, out)
    run_any(command, out, "--bpe-merges", 20)
    after = snapshot(out)
    assert {name: after[name] for name in before} == before
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {*STAGES[:-1], ".stamps"}


def test_originals_where_a_stage_is_written(multi30k, capsys):
    """The commands that once deleted their own input."""
    folder = multi30k / "project"
    for name in ("raw", "bpe"):
        shutil.copytree(multi30k, folder / name, ignore=lambda *_: ["project", "test_2018_x.de"])
    options = ["multi30k", "--raw", folder / "raw", "--out", folder]
    message = refused(capsys, multi30k, run, *options)
    assert f"{folder}/raw is in {folder}/raw, which --out {folder} would write; move it" in message
    train = text_options(folder, "--train", folder / "bpe" / "train", out=".")
    message = refused(capsys, multi30k, run, *train)
    assert f"{folder}/bpe/train.de.gz is in {folder}/bpe" in message
    (multi30k / "link").symlink_to(folder / "raw")
    options[2] = multi30k / "link"
    assert "link is in" in refused(capsys, multi30k, run, *options)
    # beside the stages they are found
    options[2] = folder / "orig"
    (folder / "raw").rename(folder / "orig")
    (folder / "bpe").rename(folder / "elsewhere")
    run(*options, "--no-binarize", "--workers", 1, "--bpe-merges", 20)
    assert len(lines_of(folder / "raw" / "train.de")) == 40


def test_the_output_of_an_earlier_run_is_no_input(data, capsys):
    out = run_text(data)
    more = ["--no-binarize", "--test", out / "tok" / "test"]
    message = refused(capsys, data, run, *text_options(data, *more))
    assert "tok/test.de is in" in message


def test_data_in_the_output_folder_are_found(multi30k):
    run("multi30k", "--raw", multi30k, "--out", multi30k, "--no-binarize", "--bpe-merges", 20)
    assert pairs_of(multi30k / "raw", "test") == corpus(2, 2)
    run("multi30k", "--raw", multi30k, "--out", multi30k, "--no-binarize", "--bpe-merges", 10)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda out: as_file(out / "tok" / "notes.txt"), "tok/notes.txt"),
        (lambda out: (out / "tok" / "mine").mkdir(), "tok/mine"),
        (lambda out: (out / "tok" / "link").symlink_to(out), "tok/link (a link)"),
        (lambda out: flip(out / "tok" / "train.de"), "tok/train.de"),
        (lambda out: flip(out / "code"), "code"),
        (lambda out: (out / "tok" / "train.de").write_text("cut"), "tok/train.de"),
    ],
)
def test_what_the_user_added_or_changed_is_kept(data, capsys, spoil, name):
    out = run_text(data)
    spoil(out)
    message = refused(capsys, data, run_text, data, "--lowercase")
    assert f"will not overwrite {out / name}: not written by" in message
    if name != "tok/train.de":  # a run that would not replace it leaves it where it is
        before = snapshot(out)
        run_text(data)
        assert snapshot(out) == before


def flip(path):
    """Another first letter: the file's size is the same."""
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def test_what_changes_while_a_stage_is_made_is_kept(data, capsys, monkeypatch):
    out = run_text(data)
    build = prepare.Preparation.build_tok

    def slow(self, part):
        flip(out / "tok" / "train.de")
        return build(self, part)

    monkeypatch.setattr(prepare.Preparation, "build_tok", slow)
    content = (out / "tok" / "train.de").read_bytes()
    assert "tok/train.de: not written" in error_of(capsys, run_text, data, "--lowercase")
    changed = (out / "tok" / "train.de").read_bytes()
    assert changed != content and changed[1:] == content[1:]


def test_stamps_of_the_version_before(data, capsys):
    """They record that a stage is done, but not what it wrote, so nothing may be replaced."""
    out = run_text(data)
    for path in out.glob(".stamps/*.json"):
        record = json.loads(path.read_text())
        del record["sha256"]
        path.write_text(json.dumps(record))
    capsys.readouterr()
    run_text(data)
    assert redone(capsys.readouterr().out) == []
    message = refused(capsys, data, run_text, data, "--max-length", 99)
    assert f"will not overwrite {out}/split, {out}/code, {out}/bpe: not written" in message
    assert "move or delete it, or give another --out" in message
    for name in ("split", "bpe"):
        shutil.rmtree(out / name)
    (out / "code").unlink()
    run_text(data, "--max-length", 99)
    assert redone(capsys.readouterr().out) == ["split", "code", "bpe"]


@pytest.mark.parametrize("content", ["{}", "[]", "theirs", '{"digest": 1}', ""])
def test_a_stamp_of_something_else(data, capsys, content):
    write_lines(data / "out" / ".stamps" / "raw.json", [content])
    assert "raw.json was not written by prepare.py" in refused(capsys, data, run_text, data)


def test_a_linked_stage(data, capsys):
    """A finished stage may be a link; a stage to be made may not be one."""
    out = run_text(data)
    (out / "tok").rename(data / "big disk")
    (out / "tok").symlink_to(data / "big disk")
    capsys.readouterr()
    run_text(data)
    assert redone(capsys.readouterr().out) == []
    message = refused(capsys, data, run_text, data, "--lowercase")
    assert f"will not overwrite {out}/tok (a link): " in message
    (data / "linked").symlink_to(out)
    run_text(data, out="linked")
    assert redone(capsys.readouterr().out) == []


def start(data):
    """The script, on its way; its --out is `data`/out."""
    options = [*text_options(data, "--workers", 2, "--valid", data / "valid"), "--bpe-merges", 9999]
    return subprocess.Popen(map(str, [sys.executable, SCRIPT, *options]), stderr=subprocess.PIPE)


def test_one_run_at_a_time_and_none_after_a_killed_one_waits(data, capsys, monkeypatch):
    write_pairs(data / "train", corpus(50_000))
    with start(data) as first:
        while not list((data / "out").glob(".stamps/.evolving-attention-*/*")):
            assert first.poll() is None
            time.sleep(0.01)
        message = error_of(capsys, run_text, data)
        assert f"another run is using {data}/out; wait until it ends" in message
        assert first.poll() is None
        first.kill()
    write_pairs(data / "train", corpus(60))
    assert list((data / "out").glob(".stamps/.evolving-attention-*"))
    out = run_text(data)
    assert not list(out.rglob(".evolving-attention-*"))
    assert len(lines_of(out / "bpe" / "train.de")) == 60


# ----------------------------------------------------------------------------------- errors


def replace_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "test.en").unlink(), "test.en: no such file (nor test.en.gz)"),
        (replace_bytes("valid.de", b""), "valid.de: no sentence in it; one a line is right"),
        (
            replace_bytes("test.en", b"one\ntwo\n"),
            "test.de has 5 lines but {folder}/test.en has 2 lines; line n of one must translate",
        ),
        (
            replace_bytes("test.de", "gut\nschön\n".encode("latin-1")),
            "test.de: line 2: byte 4 (0xf6) is not UTF-8; convert the file (iconv -f ISO-8859-1",
        ),
        (replace_bytes("train.de", b"gut\nPK\0\3\n"), "train.de: line 2: a binary file, not UTF-8"),
        (
            replace_bytes("train.de", "gut\n".encode("utf-16")),
            "train.de: UTF-16 text; convert the file to UTF-8 (iconv -f UTF-16 -t UTF-8)",
        ),
    ],
)
def test_unfit_files(data, capsys, spoil, message):
    spoil(data)
    assert message.format(folder=data) in error_of(capsys, run_text, data)


WITHOUT_SPACES = {
    "zh": "我们 昨天 在 北京 看 了 一 场 很 好 的 电影 。",
    "ja": "私 は 昨日 東京 で とても 良い 映画 を 見 ました 。",
    "th": "เมื่อวาน เรา ดู หนัง ที่ ดี มาก ที่ กรุงเทพ",
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("lang", WITHOUT_SPACES)
@pytest.mark.slow
def test_a_language_without_spaces(tmp_path, capsys, lang, turned):
    """Without segmentation all its pairs are dropped: an error says why; if most are, a warning."""
    segmented = WITHOUT_SPACES[lang], "Yesterday we saw a very good film there ."
    joined = segmented[0].replace(" ", ""), segmented[1]
    langs = ("en", lang) if turned else (lang, "en")
    options = ["text", "--source-lang", langs[0], "--target-lang", langs[1], "--workers", 1]
    options += ["--out", tmp_path / "out", "--bpe-merges", 40, "--no-binarize"]
    options += ["--valid-every", 5, "--train", tmp_path / "train"]
    options += ["--no-tokenize"] if lang == "th" else []  # Moses cuts Thai at its tone marks

    def run_on(pairs, *more):
        for side, lines in zip((lang, "en"), zip(*pairs, strict=True), strict=True):
            write_lines(tmp_path / f"train.{side}", lines)
        run(*options, *more)
        return capsys.readouterr().err

    hint = f"; {lang} has no spaces between words, so that a sentence counts as one word"
    for more in ([], ["--ratio", "inf", "--min-length", 5]):
        message = error_of(capsys, run_on, [joined] * 60, *more)
        assert hint in message and "segment it into words first (jieba" in message
    few = [segmented] * 20
    assert f"warning: only 20 training pairs are left{hint}" in run_on([joined] * 60 + few)
    assert not run_on([segmented] * 60)
    assert not run_on([joined] * 60 + few, "--ratio", "inf")
    assert "spaces" not in error_of(capsys, run_on, [("one", "a b c d e f")] * 60)


def test_unfit_gzip_files(multi30k, capsys):
    whole = (multi30k / "train.de.gz").read_bytes()
    (multi30k / "train.de.gz").write_bytes(whole[:-30])
    assert "train.de.gz: damaged or incomplete" in error_of(capsys, run_multi30k, multi30k)
    (multi30k / "train.de.gz").write_bytes(gzip.decompress(whole))
    (multi30k / "val.de.gz").rename(multi30k / "val.de")
    out = run_multi30k(multi30k)  # what is gzipped is told by content, not by name
    assert pairs_of(out / "raw", "train") == corpus(40, 40)
    assert pairs_of(out / "raw", "valid") == corpus(6, 6)


def test_unfit_raw_folders(tmp_path, multi30k, capsys):
    write_lines(multi30k / "copy" / "val.de", ["noch einmal"])
    message = error_of(capsys, run_multi30k, multi30k)
    assert "more than one val.de" in message and "copy/val.de" in message
    for path in multi30k.rglob("val.*"):
        path.unlink()
    assert "no val.de or valid.de in it" in error_of(capsys, run_multi30k, multi30k)
    for path in multi30k.glob("test*.en.gz"):
        path.unlink()
    assert "no test set in it (test*.de with" in error_of(capsys, run_multi30k, multi30k)
    write_lines(tmp_path / "de-en.tgz", ["PK"])
    for name in ("none", "de-en.tgz"):
        options = ["multi30k", "--raw", tmp_path / name, "--out", tmp_path / "out"]
        assert f"{name}: no such folder; unpack archives" in error_of(capsys, run, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-lang", "de"], "source and target language are both de"),
        (["--binarize", "--out", "a:b"], "a:b: fairseq splits paths at ':'; choose"),
        (["--target-lang", "e-n"], "'e-n' is not letters, digits and _"),
        (["--bpe-merges", "0"], "must be a whole number of at least 1, got 0"),
        (["--ratio", "0.5"], "--ratio 0.5: longer side / shorter side is never below 1"),
        (["--ratio", "nan"], "--ratio nan"),
        (["--min-length", "9", "--max-length", "8"], "--min-length 9 is above --max-length 8"),
        (["--valid-every", "1"], "--valid-every 1 leaves nothing to train on"),
    ],
)
def test_unfit_options(data, capsys, options, message):
    assert message in error_of(capsys, run_text, data, *options)
    assert not (data / "out").exists()


def test_the_output_folder_is_no_file(data, capsys):
    message = error_of(capsys, run_text, data, "--out", data / "train.de")
    assert "train.de is a file; give a folder" in message


def test_too_little_left(data, capsys):
    message = error_of(capsys, run_text, data, "--max-length", 2)
    assert "cleaning left no training pair: dropped (longer than 2) 60; loosen" in message
    message = error_of(capsys, run, *text_options(data, "--valid-every", 61, "--no-binarize"))
    assert "cleaning left 60 pairs, too few to make every 61-th one the validation set" in message
    for pair in ([("a b", "c d")], [("ab c", "de f")]):
        write_pairs(data / "train", pair)
        message = error_of(capsys, run_text, data)
        assert "1 training pairs are too few to learn BPE from" in message


def _make_deadly():
    return lambda pair: os._exit(1)


def test_a_killed_worker_is_reported():
    with pytest.raises(prepare.DataError, match="a worker process was killed"):
        list(commands.in_processes(_make_deadly, corpus(3), workers=2))


def test_fairseqs_failure_is_reported(data, monkeypatch):
    failed = subprocess.CompletedProcess([], 3, stdout="first\nOut of disk\n")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"fairseq-preprocess failed \(exit status 3\)") as error:
        run(*text_options(data, "--valid", data / "valid"))
    assert "Out of disk" in str(error.value)
    assert not (data / "out" / "data-bin").exists()
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        run(*text_options(data, "--valid", data / "valid"))
    assert error.value.code == 2
