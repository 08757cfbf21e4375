#!/usr/bin/env python3
"""Trains a small evolving transformer to translate and shows the results: ``make demo``.

The corpus is generated (by corpus.py in this folder); the rest is done by the usual tools:
examples/translation/prepare.py, fairseq-train, fairseq-generate, sacreBLEU. A rerun skips finished
stages and continues an interrupted training. Nothing is ever deleted or replaced: to start again,
give another --out or delete the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import matplotlib  # noqa: F401 (for the last stage)
    from corpus import build
    from sacrebleu.metrics import BLEU
    from tqdm import tqdm

    from evolving_attention.commands import (
        DataError,
        alone_in,
        check_data_path,
        positive,
        whole_or_not_at_all,
    )
except ImportError as error:
    sys.exit(f"demo.py: {error}; try: pip install -e '.[fairseq,viz,demo]'")

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent

SIZES = {"train": 14_000, "valid": 500, "test": 1_000}
STAGES = ("corpus", "preparation", "training", "translation", "picture")
# No buffer: fairseq never stops its thread that reads ahead, and the interpreter may crash over it
# at the end.
TRAINING = """
    --arch ea_transformer_tiny --share-all-embeddings
    --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    --encoder-layers 3 --decoder-layers 2 --dropout 0.1
    --optimizer adam --adam-betas (0.9,0.98) --lr 4e-3 --lr-scheduler inverse_sqrt
    --warmup-updates 300 --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --max-tokens 4096 --required-batch-size-multiple 1 --cpu --num-workers 0
    --data-buffer-size 0 --no-epoch-checkpoints --log-format json --log-interval 10
""".split()


def stage(name: str, text: str) -> None:
    print(f"\n[{STAGES.index(name) + 1}/{len(STAGES)}] {text}", flush=True)


def fairseq(tool: str, *args: object) -> list[str]:
    """The command line of fairseq-`tool`, in this environment and with our --user-dir."""
    command = [sys.executable, "-m", f"fairseq_cli.{tool}", *map(str, args)]
    return [*command, "--user-dir", str(REPO / "ea_fairseq")]


def fail(what: str, log: Path) -> None:
    """Exits with the last lines of the log."""
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    sys.exit(f"\n{what} failed. The end of its log, {log}:\n\n{tail}")


def lines_of(what: str, command: list[str], log: Path) -> Iterator[str]:
    """Yields the lines that a command prints, and appends them to `log`."""
    # Threads that spin while they wait are six times as slow on shared cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    paths = [str(REPO), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command, **output, text=True, errors="replace", env=environment
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                yield line
        except BaseException:  # above all Ctrl-C: no process must go on in the background
            process.terminate()
            raise
    if process.returncode:
        fail(what, log)


def prepare(out: Path, seed: int) -> None:
    """The corpus, tokenised, in BPE, binarised. Skips what is there already."""
    stage("corpus", f"German and English, {SIZES['train']:,} pairs to learn from")
    if not (out / "raw").exists():
        with whole_or_not_at_all(out / "raw") as part:
            build(part, seed, **SIZES)
    stage("preparation", "tokens, byte-pair encoding, fairseq's binary format")
    command = [sys.executable, str(REPO / "examples/translation/prepare.py"), "text"]
    command += ["--source-lang", "de", "--target-lang", "en", "--out", str(out / "prepared")]
    command += ["--ratio", "9", "--bpe-merges", "400"]  # one German word is ten English ones
    for split in SIZES:
        command += [f"--{split}", str(out / "raw" / split)]
    log = out / "prepare.log"
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file)
    if done.returncode:
        fail("The preparation", log)


def train(out: Path, seed: int, updates: int) -> None:
    """fairseq-train up to `updates`, its log in train.log, its progress on the screen."""
    stage("training", f"ea_transformer, {updates:,} updates on the CPU")
    done = out / "trained"
    if done.exists():  # fairseq-train would add an update to a training that is complete
        print("done in an earlier run")
        return
    command = fairseq("train", out / "prepared/data-bin", *TRAINING)
    command += ["--max-update", str(updates), "--seed", str(seed)]
    command += ["--save-dir", str(out / "checkpoints")]
    with tqdm(total=updates, unit="update") as bar:
        for line in lines_of("The training", command, out / "train.log"):
            numbers = re.search(r"\{.*\}", line)
            if "| train_inner |" in line and numbers:
                values = json.loads(numbers[0])
                bar.n = int(values["num_updates"])
                bar.set_postfix_str(f"loss {values['loss']}")
            elif "| valid |" in line and numbers:
                values = json.loads(numbers[0])
                bar.write(f"epoch {values['epoch']:>3}   held-out loss {values['valid_loss']}")
        bar.n = updates
        bar.refresh()
    done.touch()


def translate(out: Path) -> list[str]:
    """The test set in English by fairseq-generate, beam 5: a line a sentence, in order."""
    stage("translation", f"{SIZES['test']:,} sentences that training has never seen, beam 5")
    done = out / "translations.en"
    if done.exists():
        print("done in an earlier run")
        return done.read_text(encoding="utf-8").splitlines()
    command = fairseq("generate", out / "prepared/data-bin")
    command += ["--path", str(out / "checkpoints/checkpoint_best.pt"), "--beam", "5"]
    command += ["--batch-size", "100", "--required-batch-size-multiple", "1", "--cpu"]
    command += ["--tokenizer", "moses", "--source-lang", "de", "--target-lang", "en"]
    command += ["--remove-bpe", "--max-len-a", "2", "--max-len-b", "50"]
    lines: dict[int, str] = {}
    with tqdm(total=SIZES["test"], unit="sentence") as bar:
        for line in lines_of("The translation", command, out / "generate.log"):
            found = re.match(r"D-(\d+)\t\S+\t(.*)", line)
            if found:
                lines[int(found[1])] = found[2]
                bar.update()
    translations = [lines[index] for index in sorted(lines)]
    with whole_or_not_at_all(done) as part:
        part.write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    return translations


def show(out: Path, translations: list[str]) -> None:
    """Prints sacreBLEU, exact matches and a few translations."""
    sources, references = (
        (out / f"raw/test.{lang}").read_text(encoding="utf-8").splitlines() for lang in ("de", "en")
    )
    bleu = BLEU()
    score = bleu.corpus_score(translations, [references])
    exact = [ours == reference for ours, reference in zip(translations, references, strict=True)]
    print()
    wrong = [index for index, same in enumerate(exact) if not same]
    for index in sorted({*range(4), *wrong[:1]}):
        print(f"  German  {sources[index]}\n  ours    {translations[index]}")
        print(
            "          (as the reference)\n" if exact[index] else f"  right   {references[index]}\n"
        )
    print(
        f"sacreBLEU {score.score:.1f}   exact match {100 * sum(exact) / len(exact):.1f} %   "
        f"({len(exact):,} held-out sentences; {bleu.get_signature()})"
    )


def draw(out: Path) -> None:
    """How the attentions evolve on one sentence: rows are layers, columns are heads."""
    stage("picture", "the attention maps of a sentence, layer by layer")
    if (out / "maps-movement.png").exists():
        print("done in an earlier run")
        return
    bpe = (out / "prepared/bpe/test.de").read_text(encoding="utf-8").splitlines()
    sentence = min(bpe, key=lambda line: (abs(len(line.split()) - 10), line.count("@@")))
    checkpoint = str(out / "checkpoints/checkpoint_best.pt")
    data = str(out / "prepared/data-bin")
    command = ["-m", "ea_maps", "sentence", checkpoint, sentence]
    command += ["--data", data, "--out", str(out / "maps.png")]
    print(shlex.join(["python", *command]), flush=True)
    for line in lines_of("Drawing", [sys.executable, "-W", "ignore", *command], out / "maps.log"):
        print(line, end="", flush=True)


def claim(out: Path, settings: str) -> None:
    """Marks `out` as the folder of a run with these settings; DataError if it is something else."""
    check_data_path(out)
    out.mkdir(parents=True, exist_ok=True)
    mark = out / "demo.json"
    if mark.exists():
        if mark.read_text(encoding="utf-8", errors="replace") != settings:
            raise DataError(
                f"{out} holds a run with other settings: give another --out or delete it"
            )
    elif any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no demo: give another --out")
    else:
        mark.write_text(settings, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPO / "build/demo", help="folder to work in")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-update", type=positive, default=1000, help="length of the training")
    args = parser.parse_args()
    start = time.time()
    try:
        claim(args.out, json.dumps([args.seed, args.max_update, SIZES, TRAINING]))
        with alone_in(args.out):
            prepare(args.out, args.seed)
            train(args.out, args.seed, args.max_update)
            show(args.out, translate(args.out))
            draw(args.out)
    except (DataError, OSError) as error:
        sys.exit(f"demo.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command continues from the last epoch.")
    print(f"\nDone in {time.time() - start:.0f} s.")
    for what, name in (
        ("checkpoint", "checkpoints/checkpoint_best.pt"),
        ("log", "train.log"),
        ("picture", "maps-encoder-decoder.png"),
    ):
        print(f"  {what:12}{args.out / name}")


if __name__ == "__main__":
    main()
