"""What the usual preparation and training of each data set look like."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, replace

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


WMT14 = Recipe(
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
)
RECIPES = {
    "iwslt14": Recipe(lowercase=True, straighten_apostrophes=True),
    "wmt14": WMT14,
    "wmt14-en-fr": replace(
        WMT14,
        valid_every=1333,
        arch="ea_transformer_vaswani_wmt_en_fr_big",
        train_options=tuple(x.replace("dropout 0.3", "dropout 0.1") for x in WMT14.train_options),
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
