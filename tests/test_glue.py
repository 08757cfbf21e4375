"""examples/glue, on small files in the official formats, through fairseq's commands."""

import importlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils, encoders
from sklearn.metrics import f1_score, matthews_corrcoef
from test_fairseq_commands import ENVIRONMENT, USER_DIR, command, fairseq, weights
from test_prepare import as_folder, snapshot
from tokenizers import ByteLevelBPETokenizer

import ea_fairseq.average_checkpoints as averaging
from ea_fairseq.models.ea_roberta import EARobertaModel

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "examples" / "glue"
sys.path.insert(0, str(FOLDER))
glue = importlib.import_module("glue")
finetune = importlib.import_module("finetune")
evaluate = importlib.import_module("evaluate")
spec = importlib.util.spec_from_file_location("prepare_glue", FOLDER / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
sys.modules["prepare_glue"] = prepare
spec.loader.exec_module(prepare)

# The first lines of the official files, and those of their test sets.
HEADERS = {
    "CoLA": (None, "index sentence"),
    "SST-2": ("sentence label", "index sentence"),
    "MRPC": (
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        "index|#1 ID|#2 ID|#1 String|#2 String",
    ),
    "STS-B": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
    ),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "MNLI": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
        "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
        "sentence1_parse sentence2_parse sentence1 sentence2",
    ),
    "QNLI": ("index question sentence label", "index question sentence"),
    "RTE": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
    "WNLI": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}
SIZES = {"train": 40, "valid": 12, "valid1": 8, "test": 6, "test1": 5}
WORDS = "the café dog doesn't see a cat “there” , yet 37 naïve birds sing".split()


# Written out again: each task's known labels, metrics and recipe.
TASKS = {
    "CoLA": (("0", "1"), ("mcc",), "mcc", 1e-5, 16),
    "SST-2": (("0", "1"), ("accuracy",), "accuracy", 1e-5, 32),
    "MRPC": (("0", "1"), ("f1", "accuracy"), "acc_and_f1", 1e-5, 16),
    "STS-B": ((), ("pearson", "spearman"), "loss", 2e-5, 16),
    "QQP": (("0", "1"), ("f1", "accuracy"), "acc_and_f1", 1e-5, 32),
    "MNLI": (("contradiction", "neutral", "entailment"), ("accuracy",), "accuracy", 1e-5, 32),
    "QNLI": (("not_entailment", "entailment"), ("accuracy",), "accuracy", 1e-5, 32),
    "RTE": (("not_entailment", "entailment"), ("accuracy",), "accuracy", 2e-5, 16),
    "WNLI": (("0", "1"), ("accuracy",), "accuracy", 2e-5, 16),
}


def columns_of(header):
    return header.split("|" if "|" in header else " ")


def sentence(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + rng.choice([".", "!", " ?", '"'])


def make_task(raw, task, rng):
    """Official files with random sentences; returns what each split must hold."""
    expected = {}
    for split, names in task.files:
        if (task.name, split) == ("CoLA", "valid1"):
            continue  # GLUE's files have only one validation set
        labelled = not split.startswith("test")
        header = HEADERS[task.name][0 if labelled else 1]
        columns = list(task.header) if header is None else columns_of(header)
        if task.name == "MNLI" and split.startswith("valid"):
            columns[-1:] = ["label2", "label3", "label4", "label5", "gold_label"]
        rows, examples = [], []
        for number in range(SIZES[split]):
            inputs = tuple(sentence(rng) for _ in task.inputs)
            label = rng.choice(task.labels) if task.labels else f"{rng.uniform(0, 5):.3f}"
            row = dict.fromkeys(columns, "-") | {columns[0]: str(number)}
            row |= dict(zip(task.inputs, inputs, strict=True))
            row |= {task.label: label} if labelled else {}
            rows.append("\t".join(row[column] for column in columns))
            examples.append((inputs, label if labelled else None))
        if header is not None:
            rows.insert(0, "\t".join(columns))
        path = raw / task.name / names[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        bom = "\ufeff" if task.name == "MRPC" else ""  # as the official files have it
        path.write_bytes((bom + "\n".join(rows) + "\n").encode())
        expected[split] = examples
    return expected


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A folder of all nine tasks, and what they hold: {task: {split: [(inputs, label)]}}."""
    folder, rng = tmp_path_factory.mktemp("glue") / "glue_data", random.Random(0)
    return folder, {name: make_task(folder, task, rng) for name, task in glue.TASKS.items()}


@pytest.fixture(scope="session")
def text(raw):
    """Text to pre-train on, from the tasks' sentences, and the BPE learned from it."""
    out = raw[0].parent / "text"
    run("text", "--raw", raw[0], "--tasks", "CoLA", "RTE", "MNLI", "--out", out)
    return out


@pytest.fixture(scope="session")
def tasks(raw, text):
    out = raw[0].parent / "tasks"
    run("tasks", "--raw", raw[0], "--bpe", text / "bpe", "--out", out)
    return out


def run(command, *options):
    prepare.main([command, "--workers", "1", *map(str, options)])


def bpe_of(folder):
    options = prepare.Bpe(folder).options
    return encoders.build_bpe(options)


def decoded(prefix, bpe):
    """The lines of a binarised file, as text."""
    dictionary = Dictionary.load(str(prefix.parent / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(prefix), dictionary)
    return [bpe.decode(dictionary.string(line)) for line in dataset]


# ------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_are_as_known(name):
    task = glue.TASKS[name]
    assert (task.labels, task.metrics, task.best, task.lr, task.batch_size) == TASKS[name]
    assert glue.TASKS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_split_holds_the_official_sentences_and_labels(raw, text, tasks, name):
    task, bpe = glue.TASKS[name], bpe_of(text / "bpe")
    for split, examples in raw[1][name].items():
        for index in range(len(task.inputs)):
            lines = decoded(tasks / name / f"input{index}" / split, bpe)
            assert lines == [inputs[index] for inputs, _ in examples]
        if split.startswith("test"):
            assert not list((tasks / name / "label").glob(f"{split}.*"))
        elif task.is_regression:
            scores = (tasks / name / "label" / f"{split}.label").read_text().split()
            expected = [float(label) / 5 for _, label in examples]
            assert np.allclose(list(map(float, scores)), expected)
        else:
            dictionary = Dictionary.load(str(tasks / name / "label" / "dict.txt"))
            labels = data_utils.load_indexed_dataset(
                str(tasks / name / "label" / split), dictionary
            )
            indices = [label[0].item() - dictionary.nspecial for label in labels]
            assert [task.labels[index] for index in indices] == [label for _, label in examples]
    assert (len(task.inputs) == 2) == (tasks / name / "input1").exists()


def test_the_learned_bpe_is_what_fairseqs_gpt2_bpe_reads(text):
    """Both read the same files and split every text the same way, even unseen bytes."""
    files = [text / "bpe" / "encoder.json", text / "bpe" / "vocab.bpe"]
    theirs = ByteLevelBPETokenizer(*map(str, files))
    ours = bpe_of(text / "bpe")
    for line in [*WORDS, " ".join(WORDS), "Ünseen   wörds, 東京 🙂 \u2028 x", "tabs\tand  spaces "]:
        tokens = ours.encode(line)
        assert list(map(int, tokens.split())) == theirs.encode(line).ids
        assert ours.decode(tokens) == line
    dictionary = Dictionary.load(str(text / "bpe" / "dict.txt"))
    assert set(dictionary.symbols[4:]) == set(map(str, json.loads(files[0].read_text()).values()))


def test_a_bpe_of_subword_nmt_serves_as_well(raw, tmp_path):
    bpe = tmp_path / "bpe"
    bpe.mkdir()
    (bpe / "bpecodes").write_text("#version: 0.2\nt h\nth e</w>\n")
    symbols = sorted({f"{c}{end}" for word in WORDS for c in word + '.!?"' for end in ("", "@@")})
    (bpe / "dict.txt").write_text("".join(f"{s} 1\n" for s in [*symbols, "the", "th@@"]))
    run("tasks", "--raw", raw[0], "--tasks", "RTE", "--bpe", bpe, "--out", tmp_path / "out")
    lines = decoded(tmp_path / "out" / "RTE" / "input0" / "train", bpe_of(bpe))
    assert lines == [inputs[0] for inputs, _ in raw[1]["RTE"]["train"]]


def test_workers_change_nothing(raw, text, tmp_path):
    out = tmp_path / "out"
    options = ["--raw", raw[0], "--tasks", "MNLI", "--bpe", text / "bpe"]
    run("tasks", *options, "--out", out)
    prepare.main(["tasks", "--workers", "3", *map(str, options), "--out", f"{out}2"])
    for path in out.rglob("*"):
        if path.is_file():
            assert (Path(f"{out}2") / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_documents_and_validation_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n\nfour\n")
    assert prepare.documents(prepare.lines_of(tmp_path / "a.txt")) == [
        ["one", "two"],
        ["three"],
        ["four"],
    ]
    assert prepare.documents(["one", "two", ""]) == [["one"], ["two"]]
    run("text", "--text", tmp_path / "a.txt", "--valid-every", 2, "--out", tmp_path / "out")
    bpe = bpe_of(tmp_path / "out" / "bpe")
    assert decoded(tmp_path / "out" / "train", bpe) == ["one", "two", "", "four", ""]
    assert decoded(tmp_path / "out" / "valid", bpe) == ["three", ""]
    (tmp_path / "b.txt").write_text("five\n")
    given = ["--valid", tmp_path / "b.txt", "--bpe", tmp_path / "out" / "bpe"]
    run("text", "--text", tmp_path / "a.txt", *given, "--out", tmp_path / "other")
    assert decoded(tmp_path / "other" / "valid", bpe) == ["five", ""]
    assert not (tmp_path / "other" / "bpe").exists()


def test_the_corpus_of_colas_own_release(raw, text, tmp_path):
    rows = "gj04\t1\t\tA sentence.\ngj04\t0\t*\tSentence a.\n"
    folder = tmp_path / "raw" / "CoLA"
    folder.mkdir(parents=True)
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (folder / f"{name}.tsv").write_text(rows)
    bpe = text / "bpe"
    run("tasks", "--raw", folder.parent, "--tasks", "CoLA", "--bpe", bpe, "--out", tmp_path / "out")
    for split in ("train", "valid", "valid1"):
        lines = decoded(tmp_path / "out" / "CoLA" / "input0" / split, bpe_of(bpe))
        assert lines == ["A sentence.", "Sentence a."]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("RTE", lambda t: t.replace("sentence2", "hypothesis", 1), "no column sentence2"),
        ("RTE", lambda t: t.replace("not_entailment", "maybe", 1), "label 'maybe'; those of RTE"),
        ("RTE", lambda t: t + "7\tonly two\n", "line 42: 2 columns instead of 4"),
        ("CoLA", lambda t: "index\tlabel\tsentence\n" + t, "line 1: 3 columns instead of 4"),
        ("CoLA", lambda t: "a\tb\tc\td\n" + t, "line 1: label 'b'; those of CoLA are 0, 1"),
        ("STS-B", lambda t: t.rsplit("\t", 1)[0] + "\t5.1\n", "score '5.1'; those of STS-B"),
        ("STS-B", lambda t: t.rsplit("\t", 1)[0] + "\tnan\n", "score 'nan'"),
        ("STS-B", lambda t: t.rsplit("\t", 1)[0] + "\thigh\n", "score 'high'"),
        ("QNLI", lambda t: "", "no column question"),
        ("QNLI", lambda t: t.split("\n")[0] + "\n", "no examples"),
        ("QNLI", lambda t: None, "no train.tsv in"),
    ],
)
def test_wrong_files_are_named_and_nothing_is_left(
    raw, text, tmp_path, capsys, name, change, message
):
    folder = tmp_path / "raw" / name
    folder.mkdir(parents=True)
    for path in (raw[0] / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    changed = change((folder / "train.tsv").read_text(encoding="utf-8"))
    (folder / "train.tsv").unlink()
    if changed is not None:
        (folder / "train.tsv").write_text(changed, encoding="utf-8")
    options = ["--raw", folder.parent, "--tasks", name, "--bpe", text / "bpe"]
    with pytest.raises(SystemExit) as stopped:
        run("tasks", *options, "--out", tmp_path / "out")
    assert message in str(stopped.value)
    assert not list(tmp_path.glob("out/*"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    for encoding, message in (
        ("utf-16", "iconv -f UTF-16 -t UTF-8"),
        ("latin-1", "line 2: byte 4"),
    ):
        (tmp_path / "x.txt").write_bytes("gut\nschön\n".encode(encoding))
        with pytest.raises(SystemExit, match=f"x.txt: .*{message}"):
            run("text", "--text", tmp_path / "x.txt", "--out", tmp_path / "out")


def test_bad_lines_are_left_out_if_asked_for(raw, text, tmp_path, capsys):
    folder = tmp_path / "raw" / "QQP"
    folder.mkdir(parents=True)
    for path in (raw[0] / "QQP").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with (folder / "train.tsv").open("a") as file:
        file.write("a question with\ta tab\n")
    options = ["--raw", folder.parent, "--tasks", "QQP", "--bpe", text / "bpe", "--skip-bad-lines"]
    run("tasks", *options, "--out", tmp_path / "out")
    lines = decoded(tmp_path / "out" / "QQP" / "input0" / "train", bpe_of(text / "bpe"))
    assert len(lines) == SIZES["train"]
    assert "1 lines with a wrong number of columns left out" in capsys.readouterr().out
    with (folder / "test.tsv").open("a") as file:  # the server counts these
        file.write("a question with\ta tab\n")
    with pytest.raises(SystemExit, match=r"test\.tsv, line 8: 2 columns instead of 3"):
        run("tasks", *options, "--out", tmp_path / "other")


def test_a_task_can_be_added(raw, text, tmp_path):
    options = ["--raw", raw[0], "--bpe", text / "bpe", "--out", tmp_path / "out"]
    run("tasks", *options, "--tasks", "RTE")
    run("tasks", *options, "--tasks", "CoLA")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["CoLA", "RTE"]
    with pytest.raises(SystemExit, match="has RTE already.*--tasks MRPC"):
        run("tasks", *options, "--tasks", "MRPC", "RTE")
    assert not (tmp_path / "out" / "MRPC").exists()


def test_a_folder_full_of_somebodys_files(raw, text, tmp_path):
    """Other files and folders beside the new ones stay as they are."""
    for name in ("text.part", "RTE.part", ".RTE", "bpe", "train", "dict.txt"):
        as_folder(tmp_path / name)
    before = snapshot(tmp_path)
    options = ["--raw", raw[0], "--tasks", "RTE", "--bpe", text / "bpe"]
    run("text", *options, "--valid-every", 9, "--out", tmp_path / "text")
    run("tasks", *options, "--out", tmp_path)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"text", "RTE"}
    assert (tmp_path / "text").stat().st_mode == (tmp_path / "bpe").stat().st_mode


@pytest.mark.parametrize("command", ["text", "tasks"])
@pytest.mark.parametrize("kind", ["file", "folder", "empty", "link"])
def test_what_exists_is_refused_before_any_work(raw, text, tmp_path, command, kind):
    path = tmp_path / "RTE"
    if kind in ("folder", "empty"):
        path.mkdir()
    if kind == "folder":
        as_folder(path)
    if kind == "file":
        path.write_text("theirs")
    if kind == "link":
        path.symlink_to("nowhere")
    before = snapshot(tmp_path)
    options = ["--raw", raw[0], "--tasks", "RTE", "CoLA", "--bpe", text / "bpe", "--out"]
    with pytest.raises(SystemExit, match="RTE.* already.*; move "):
        run(command, *options, path if command == "text" else tmp_path)
    assert snapshot(tmp_path) == before


def test_paths_that_fairseq_would_split(raw, text, tasks, tmp_path):
    message = "fairseq splits paths at ':'"
    options = ["--raw", raw[0], "--tasks", "RTE", "--bpe", text / "bpe", "--out", tmp_path / "a:b"]
    for name in ("text", "tasks"):
        with pytest.raises(SystemExit, match=message):
            run(name, *options)
    assert not list(tmp_path.iterdir())
    shutil.copytree(tasks / "RTE", tmp_path / "a:b")
    with pytest.raises(SystemExit, match=message):
        finetune.main(["RTE", "--data", f"{tmp_path}/a:b", "--save-dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_a_dictionary_of_another_bpe_is_refused(raw, text, tmp_path):
    bpe = tmp_path / "bpe"
    shutil.copytree(text / "bpe", bpe)
    (bpe / "dict.txt").write_text("the 1\ndog 1\n")
    options = ["--raw", raw[0], "--tasks", "RTE", "--bpe", bpe, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match="tokens are not in .*dict.txt"):
        run("tasks", *options)
    assert not (tmp_path / "out" / "RTE").exists()
    (bpe / "encoder.json").write_text("{")
    with pytest.raises(SystemExit, match="cannot be read"):
        run("tasks", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["text", "--out", "x"], "nothing to read: give --text"),
        (["text", "--tasks", "RTE", "--out", "x"], "--tasks needs --raw"),
        (["text", "--text", "missing.txt", "--out", "x"], "cannot read missing.txt"),
        (["tasks", "--raw", ".", "--bpe", ".", "--out", "x"], "no BPE in ."),
        (["text", "--text", "missing.txt", "--out", "."], ". already exists"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        prepare.main(options)
    assert message in f"{stopped.value}{capsys.readouterr().err}"


# --------------------------------------------------------------------------- from text to scores

POSITIONS = 64
EVOLVING = ["--arch", "ea_roberta", "--ea-alpha", 0.4, "--ea-beta", 0.3]
SMALL = [
    *("--encoder-layers", 2, "--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64),
    *("--encoder-attention-heads", 2, "--cpu", "--num-workers", 0),
]


def pretrain(text, save_dir, *options):
    fairseq(
        "train",
        *(text, "--user-dir", USER_DIR, "--task", "masked_lm", "--criterion", "masked_lm"),
        *(*SMALL, "--tokens-per-sample", POSITIONS, "--sample-break-mode", "complete_doc"),
        *("--optimizer", "adam", "--lr", 0.003, "--batch-size", 8, "--save-dir", save_dir),
        *("--required-batch-size-multiple", 1),
        *("--log-format", "json", *options),
    )
    return save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def pretrained(text):
    """A pre-trained evolving model, and a plain one."""
    folder = text.parent / "pretrained"
    ours = pretrain(text, folder / "ea", *EVOLVING, "--max-epoch", 2)
    return ours, pretrain(text, folder / "plain", "--arch", "roberta", "--max-epoch", 1)


def test_a_checkpoint_saves_the_options_that_plain_roberta_saves(pretrained):
    ours, plain = (vars(torch.load(path, weights_only=True)["cfg"]["model"]) for path in pretrained)
    assert len(plain) > 100
    for name, value in plain.items():
        assert name in ("_name", "arch", "save_dir", "max_epoch") or ours[name] == value, name


def test_pretraining_resumes(text, pretrained, tmp_path):
    pretrain(text, tmp_path, *EVOLVING, "--max-epoch", 1)
    resumed = weights(pretrain(text, tmp_path, *EVOLVING, "--max-epoch", 2))
    for name, value in weights(pretrained[0]).items():
        assert torch.equal(resumed[name], value), name


def test_hub_interface(text, pretrained):
    files = {
        "gpt2_encoder_json": str(text / "bpe" / "encoder.json"),
        "gpt2_vocab_bpe": str(text / "bpe" / "vocab.bpe"),
    }
    folder, file = pretrained[0].parent, pretrained[0].name
    hub = EARobertaModel.from_pretrained(str(folder), file, str(text), **files).eval()
    tokens = hub.encode("the dog doesn't sing.", "a cat")
    assert hub.decode(tokens) == ["the dog doesn't sing.", "a cat"]
    features = hub.extract_features(tokens)
    assert features.shape == (1, len(tokens), 32)
    assert len(hub.extract_features(tokens, return_all_hiddens=True)) == 3
    filled = hub.fill_mask("the dog <mask> a cat", topk=3)
    assert 1 <= len(filled) <= 3  # fairseq leaves special tokens out
    assert all(0 < probability < 1 for _, probability, _ in filled)
    hub.register_classification_head("topic", num_classes=4)
    assert hub.predict("topic", tokens).exp().sum().item() == pytest.approx(1, abs=1e-5)


def learnable_task(raw, name, rng, size=96):
    """A task whose label depends on one word: is there a dog?"""
    folder = raw / name
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        rows = []
        for number in range(size):
            words = rng.choices([word for word in WORDS if word != "dog"], k=4)
            if dog := rng.random() < 0.5:
                words[rng.randrange(4)] = "dog"
            if (split, number) == ("train", 0):
                words += ["birds"] * 99  # longer than the model takes
            line, index = " ".join(words), str(number)
            if name == "CoLA":
                row = [index, line] if split == "test" else ["x", str(int(dog)), "", line]
            else:
                row = [index, *"gfyo12", line, "a cat"]
                row += [] if split == "test" else [str(4.5 if dog else 0.5)]
            rows.append("\t".join(row))
        header = HEADERS[name][1 if split == "test" else 0]
        if header is not None:
            rows.insert(0, "\t".join(columns_of(header)))
        (folder / f"{split}.tsv").write_text("".join(f"{row}\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("CoLA", ["--arch", "ea_roberta"]),
        ("STS-B", ["--arch", "ea_roberta", "--ea-learnable", "--ea-alpha", 0, "--ea-beta", 0]),
    ],
)
def test_finetuning_and_evaluation(text, tasks, pretrained, tmp_path, capsys, name, model):
    """From a pre-trained evolving model, and from a plain one; classes, and scores."""
    learnable_task(tmp_path / "raw", name, random.Random(1))
    options = ["--raw", tmp_path / "raw", "--tasks", name, "--bpe", text / "bpe"]
    run("tasks", *options, "--out", tmp_path / "data")
    data, save_dir = tmp_path / "data" / name, tmp_path / "checkpoints"
    arguments = [
        *(name, "--data", data, "--save-dir", save_dir, "--seeds", 1, "--epochs", 25),
        *("--checkpoint", pretrained[0 if name == "CoLA" else 1], "--lr", 0.003, "--batch-size", 8),
        *(*model, *SMALL, "--max-positions", POSITIONS, "--log-interval", 1),
    ]
    capsys.readouterr()
    finetune.main([str(option) for option in arguments])
    printed = capsys.readouterr().out
    assert printed.startswith("1 of 96 training examples are longer than --max-positions 64")
    metric = glue.TASKS[name].metrics[0]
    best = float(printed.split(f"{metric} ")[1].split()[0])
    assert best > 80
    log = (save_dir / "seed1" / "train.log").read_text()
    assert ("are not in the checkpoint and keep their initial values" in log) == (name == "STS-B")
    assert ("--ea-alpha 0.4 --ea-beta 0.3" in printed) == (name == "CoLA")
    assert ("--ea-alpha 0.4 --ea-beta 0.3" in (save_dir / "seed1/command.txt").read_text()) == (
        name == "CoLA"
    )

    # A finished seed is only scored again; evaluate.py says the same.
    finetune.main([str(option) for option in arguments])
    once = re.compile("trains, see")
    kept = [line for line in printed.splitlines() if not once.search(line)]
    assert capsys.readouterr().out.splitlines() == kept
    checkpoint = save_dir / "seed1" / "checkpoint_best.pt"
    same = [name, "--data", str(data), "--checkpoint", str(checkpoint)]
    evaluate.main(same)
    assert f"{metric} {best:.1f}" in capsys.readouterr().out

    # fairseq's own validation agrees.
    report = {"CoLA": "mcc", "STS-B": "pearson"}[name]
    out = fairseq(
        "validate",
        *(data, "--user-dir", USER_DIR, "--path", checkpoint, "--task", "sentence_prediction"),
        *("--criterion", "sentence_prediction"),
        *("--num-classes", len(glue.TASKS[name].labels) or 1, "--valid-subset", "valid"),
        *("--batch-size", 8, "--required-batch-size-multiple", 1, "--cpu"),
        *(("--regression-target", "--report-pearson-and-spearman") if name == "STS-B" else ()),
        *("--log-format", "json", "--max-positions", POSITIONS),
    )
    printed_by_fairseq = re.search(rf'"valid_{report}": "(.*?)"', out).group(1)
    assert float(printed_by_fairseq) == best

    evaluate.main([*same, "--split", "test", "--predictions", str(tmp_path / "out.tsv")])
    header, *rows = (tmp_path / "out.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(number) for number in range(96)]
    sentences = (tmp_path / "raw" / name / "test.tsv").read_text().splitlines()[1:]
    right = [
        ("dog" in line) == (float(row.split("\t")[1]) > (0.5 if name == "CoLA" else 2.5))
        for line, row in zip(sentences, rows, strict=True)
    ]
    assert sum(right) > 80
    predictions = (tmp_path / "out.tsv").read_bytes()
    with pytest.raises(SystemExit, match="out.tsv already exists; choose another name, or add"):
        evaluate.main([*same, "--predictions", str(tmp_path / "out.tsv")])
    assert (tmp_path / "out.tsv").read_bytes() == predictions
    with pytest.raises(SystemExit, match="test of .* has no labels: give --predictions"):
        evaluate.main([*same, "--split", "test"])
    # A user's own training may not shorten the examples.
    state = averaging.load(checkpoint)
    state["cfg"]["task"]["shorten_method"] = "none"
    torch.save(state, tmp_path / "long.pt")
    for file in (*data.glob("input0/train.*"), *data.glob("label/train.*")):  # has a long example
        shutil.copyfile(file, file.with_name(file.name.replace("train", "valid")))
    same[-1] = str(tmp_path / "long.pt")
    message = rf"an example of valid has \d+ tokens, but .*long.pt takes at most {POSITIONS}: fine-"
    with pytest.raises(SystemExit, match=message):
        evaluate.main(same)

    with pytest.raises(SystemExit, match="there is no folder .*nowhere"):
        evaluate.main([*same, "--predictions", str(tmp_path / "nowhere/out.tsv")])

    # Other options, another checkpoint, other data: refused.
    with pytest.raises(SystemExit, match="was not made with these options"):
        finetune.main([str(option) for option in [*arguments, "--ea-kernel-size", 1]])
    with pytest.raises(SystemExit, match="was not fine-tuned"):
        evaluate.main([*same[:-1], str(pretrained[0])])
    with pytest.raises(SystemExit, match="finished is no checkpoint of fairseq"):
        evaluate.main([*same[:-1], str(save_dir / "seed1" / "finished")])
    other = "RTE" if name == "STS-B" else "MNLI"
    with pytest.raises(SystemExit, match=f"was fine-tuned for .*, not on {other}"):
        evaluate.main([other, "--data", str(tasks / other), *same[3:]])
    with pytest.raises(SystemExit, match=f"is of {name}, not of {other}"):
        evaluate.main([other, *same[1:]])
    with pytest.raises(SystemExit, match="no task.txt in it"):
        evaluate.main([name, "--data", str(tmp_path), *same[3:]])

    files = {
        "gpt2_encoder_json": str(text / "bpe" / "encoder.json"),
        "gpt2_vocab_bpe": str(text / "bpe" / "vocab.bpe"),
    }
    hub = EARobertaModel.from_pretrained(
        str(checkpoint.parent), checkpoint.name, str(data), **files
    ).eval()
    for line, row in zip(sentences[:5], rows, strict=False):
        inputs = line.split("\t")[1:] if name == "CoLA" else line.split("\t")[-2:]
        tokens = hub.encode(*inputs)
        logits = hub.predict("sentence_classification_head", tokens, return_logits=True)[0]
        found = logits.argmax().item() if name == "CoLA" else 5 * logits.item()
        assert found == pytest.approx(float(row.split("\t")[1]), abs=0.002) or not 0 < found < 5


RESET = ["--reset-optimizer", "--reset-dataloader", "--reset-meters"]


def test_a_plain_checkpoint_by_restore_file(text, pretrained, tmp_path):
    evolving = ["--arch", "ea_roberta", "--ea-learnable", "--ea-alpha", 0, "--ea-beta", 0]
    updates = ["--max-update", 1, "--lr", 0, "--restore-file", pretrained[1], *RESET]
    restored = weights(pretrain(text, tmp_path, *evolving, *updates))
    for name, value in weights(pretrained[1]).items():
        assert torch.equal(restored.pop(name), value), name
    assert restored and all(".evolution." in name for name in restored)


def test_hydra(text, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        f"""# @package _group_
common: {{cpu: true, user_dir: {USER_DIR}}}
task: {{_name: masked_lm, data: {text}, sample_break_mode: complete_doc, tokens_per_sample: 64}}
criterion: masked_lm
dataset: {{batch_size: 8, num_workers: 0, data_buffer_size: 0, required_batch_size_multiple: 1}}
optimizer: {{_name: adam}}
lr_scheduler: fixed
optimization: {{max_update: 1, lr: [0.001]}}
checkpoint: {{save_dir: {tmp_path}/checkpoints}}
model: {{_name: ea_roberta, max_positions: 64, encoder_layers: 2, encoder_embed_dim: 32,
  encoder_attention_heads: 2, ea_beta: 0.3}}
"""
    )
    options = ["--config-dir", tmp_path, "--config-name", "tiny", "+model.ea_alpha=0.25"]
    subprocess.run(command("hydra_train", *options), check=True, env=ENVIRONMENT, cwd=tmp_path)
    (model,), *_ = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "checkpoints" / "checkpoint_last.pt")]
    )
    evolution = model.encoder.sentence_encoder.layers[1].self_attn.evolution
    assert evolution.mixing == (0.25, 0.3)


def test_a_failed_training_says_why(tasks, tmp_path):
    options = ["--data", tasks / "RTE", "--save-dir", tmp_path, "--seeds", 1, "--ea-alpha", 2]
    with pytest.raises(SystemExit, match="fairseq-train failed(.|\n)*--ea-alpha must lie in"):
        finetune.main(["RTE", *map(str, [*options, *SMALL])])
    options[-2:] = ["--ea-beta", 2]  # nothing was trained yet, so other options are welcome
    with pytest.raises(SystemExit, match="fairseq-train failed(.|\n)*--ea-beta must lie in"):
        finetune.main(["RTE", *map(str, [*options, *SMALL])])


@pytest.mark.parametrize(
    "name", ["command.txt", "finished", "train.log", "checkpoint_last.pt", "notes.txt"]
)
def test_a_folder_that_is_not_its_own_is_refused(tasks, tmp_path, name):
    folder = tmp_path / "seed1"
    as_folder(folder)
    (folder / name).write_text("theirs\n")
    before = snapshot(tmp_path)
    options = ["--data", tasks / "RTE", "--save-dir", tmp_path, "--seeds", 1]
    with pytest.raises(
        SystemExit,
        match="seed1 is not empty and was not made .*; move it, or choose another --save-dir",
    ):
        finetune.main(["RTE", *map(str, [*options, *SMALL])])
    assert snapshot(tmp_path) == before


def test_the_last_command_is_the_one_that_goes_on(tmp_path):
    given = tmp_path / "command.txt"
    for line in ("first", "first", "second", "second"):
        finetune.claim(tmp_path, given, line)
    assert given.read_text() == finetune.HEADER + "first\nsecond\n"
    (tmp_path / "checkpoint_last.pt").touch()
    finetune.claim(tmp_path, given, "second")
    with pytest.raises(
        glue.DataError, match=r"not made with these options \(see command.txt there\)"
    ):
        finetune.claim(tmp_path, given, "first")
    given.write_text("as the version before wrote it\n")
    finetune.claim(tmp_path, given, "as the version before wrote it")


@pytest.mark.parametrize("name", ["epochs", "batch-size", "update-freq", "max-positions", "lr"])
def test_numbers_of_a_finetuning_are_checked(tasks, tmp_path, capsys, name):
    options = ["--data", tasks / "RTE", "--save-dir", tmp_path, f"--{name}", 0]
    with pytest.raises(SystemExit):
        finetune.main(["RTE", *map(str, options)])
    assert f"--{name}" in capsys.readouterr().err


def test_data_that_is_missing_is_named(tasks, tmp_path):
    data = tmp_path / "RTE"
    shutil.copytree(tasks / "RTE", data)
    (data / "input0/train.bin").unlink()
    with pytest.raises(SystemExit, match=r"there is no .*input0/train.bin"):
        finetune.main(["RTE", "--data", str(data), "--save-dir", str(tmp_path)])


@pytest.mark.parametrize("name", glue.TASKS)
def test_the_command_of_every_task_fits_its_data(tasks, tmp_path, name):
    """fairseq takes the options, and the model the data: one update each."""
    options = ["--data", tasks / name, "--save-dir", tmp_path, "--seeds", 1, "--epochs", 1]
    arguments = [*options, *SMALL, "--arch", "ea_roberta", "--max-update", 1, "--no-save"]

    def train_here(args):
        line = finetune.train_command(args, glue.TASKS[name], tmp_path, 1)
        fairseq("train", *line[3:], "--log-format", "json")
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "finetune", train_here)
        finetune.main([name, *map(str, arguments)])


def test_scores_are_the_official_metrics():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 2, 50).tolist(), rng.integers(0, 2, 50).tolist()
    cola = glue.score(glue.TASKS["CoLA"], targets, predictions)
    assert cola == {"mcc": pytest.approx(100 * matthews_corrcoef(targets, predictions))}
    mrpc = glue.score(glue.TASKS["MRPC"], targets, predictions)
    assert mrpc["f1"] == pytest.approx(100 * f1_score(targets, predictions))
    right = sum(a == b for a, b in zip(targets, predictions, strict=True))
    assert mrpc["accuracy"] == pytest.approx(2 * right)
    x = rng.normal(size=50)
    scores = glue.score(glue.TASKS["STS-B"], x.tolist(), np.exp(x).tolist())
    assert scores["spearman"] == pytest.approx(100)
    assert scores["pearson"] == pytest.approx(100 * np.corrcoef(x, np.exp(x))[0, 1])
