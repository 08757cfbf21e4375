"""Draws and measures how attention maps evolve, for one sentence, image or time series.

    python -m ea_maps sentence checkpoint_best.pt "zwei junge männer im frei@@ en ." --out maps.png
    python -m ea_maps image ea_deit_small photo.jpg --checkpoint model_best.pth.tar
    python -m ea_maps series vowels.pt JapaneseVowels --case 3 --out maps.html

The ending of --out chooses what is written. A picture (.png, .svg, .pdf) shows the maps, with
layers from top to bottom and heads from left to right. Another one, maps-movement.png, shows the
entropy of each layer's maps and their Jensen-Shannon distance from the previous layer's, which are
also printed as a table. A page (.html) shows all of it in a browser: choose layer and head, and
hover to see what looks where. Arrays (.npz) are for other programs. --compare puts a second model,
evolving or plain, beside the first.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook's or a desktop's may not exist here

import numpy as np
from torch import nn

from ea_maps import draw
from ea_maps.measure import SUMMARIES, kind_of, table
from ea_maps.page import arrays, as_page
from ea_maps.view import (
    HEADS,
    MOST_HEADS,
    MOST_LAYERS,
    ImageView,
    SeriesView,
    TokenView,
    View,
    part_of,
)
from evolving_attention.commands import add_overwrite, name_value, positive, whole_or_not_at_all

CROSS = "encoder-decoder"  # has no rollout or flow: its keys are not its queries


def headings(args: argparse.Namespace, *models: nn.Module) -> List[str]:
    """The names of the models: those of --names, or what they are."""
    kinds = [kind_of(model) for model in models]
    if len(set(kinds)) < len(kinds):
        kinds = [f"{kind} {number}" for number, kind in enumerate(kinds, 1)]
    return (args.names or kinds)[: len(models)]


def is_file(checkpoint: Path) -> bool:
    """Whether it is a file, as those of fairseq are, or was meant to be one."""
    return checkpoint.is_file() or checkpoint.suffix == ".pt"


def sentence(args: argparse.Namespace) -> List[View]:
    if args.compare and is_file(args.compare) != is_file(args.checkpoint):
        raise ValueError(
            f"--compare: {args.checkpoint} and {args.compare} must both be files, of fairseq, or "
            "both be folders or names, of transformers"
        )
    if is_file(args.checkpoint):
        from ea_maps.sentence import axes_of, encode, is_translation, load, maps_of, translate
    else:
        from ea_maps.huggingface import axes_of, encode, is_translation, load, maps_of, translate

    checkpoint = load(args.checkpoint, args.data)
    source = encode(checkpoint, args.sentence)
    target = None
    if is_translation(checkpoint):
        target = (
            encode(checkpoint, args.target, True) if args.target else translate(checkpoint, source)
        )
    elif args.target:
        raise ValueError("--target: this model does not translate")
    axes = axes_of(checkpoint, source, target)
    parts = {attention: attention if len(axes) > 1 else None for attention in axes}
    check_paths(args, parts)
    checkpoints = [checkpoint]
    if args.compare:
        other = load(args.compare, args.data)
        if is_translation(other) != is_translation(checkpoint):
            raise ValueError(
                f"--compare: only one of {args.checkpoint} and {args.compare} translates"
            )
        try:
            same = encode(other, args.sentence).equal(source)
        except ValueError as error:
            raise ValueError(f"--compare: {args.compare}: {error}") from error
        if not same or axes != axes_of(other, source, target):
            raise ValueError(f"--compare: {args.compare} has a different dictionary")
        checkpoints.append(other)
    names = headings(args, *(each.model for each in checkpoints))
    models = {
        name: maps_of(each, source, target) for name, each in zip(names, checkpoints, strict=True)
    }
    return [
        TokenView(
            {name: maps[attention] for name, maps in models.items()},
            queries,
            keys,
            attention=attention,
            part=parts[attention],
        )
        for attention, (queries, keys) in axes.items()
    ]


def image(args: argparse.Namespace) -> List[View]:
    from ea_maps.image import load, look, read

    if not args.compare and (args.compare_checkpoint or args.compare_option):
        raise ValueError("--compare-checkpoint and --compare-option need a model: --compare MODEL")
    if args.compare and bool(args.checkpoint) != bool(args.compare_checkpoint):
        raise ValueError(
            "--checkpoint and --compare-checkpoint must be given together: comparing trained "
            "weights with random ones shows nothing"
        )
    picture = read(args.image)
    sides = [(args.model, args.checkpoint, dict(args.option))]
    if args.compare:
        options = args.option if args.compare_option is None else args.compare_option
        sides.append((args.compare, args.compare_checkpoint, dict(options)))
    models = [load(model, checkpoint, **options) for model, checkpoint, options in sides]
    names = headings(args, *models)
    looks = {name: look(model, picture) for name, model in zip(names, models, strict=True)}
    return [ImageView.of(looks)]


def series(args: argparse.Namespace) -> List[View]:
    from ea_aeon.data import read
    from ea_maps.series import load, look

    cases = read(args.dataset, args.split, args.folder).series
    if not 0 <= args.case < len(cases):
        raise ValueError(f"--case must lie in [0, {len(cases) - 1}], got {args.case}")
    loaded = [load(path) for path in (args.model, args.compare) if path]
    names = headings(args, *(network for network, _ in loaded))
    looks = [look(*each, cases[args.case], args.member) for each in loaded]
    maps = {name: found for name, (_, found) in zip(names, looks, strict=True)}
    return [SeriesView(maps, looks[0][0].numpy())]


def is_picture(out: Path) -> bool:
    return out.suffix.lower() not in (".html", ".npz")


def shown(attention: str, args: argparse.Namespace) -> List[str]:
    """What of --show there is of an attention."""
    return [what for what in dict.fromkeys(args.show) if what == HEADS or attention != CROSS]


def check_paths(args: argparse.Namespace, parts: Dict[str, Optional[str]]) -> None:
    """Raises an error if a picture, or the one file, cannot be written; `parts` by attention."""
    names: List[Optional[str]] = [None]
    if is_picture(args.out):
        names = [part_of(part, what) for name, part in parts.items() for what in shown(name, args)]
        names.append("movement")
    draw.check_paths(args.out, names, args.overwrite)


def write(args: argparse.Namespace, views: List[View]) -> None:
    """Writes what --out asks for, and prints the paths and the tables."""
    by_attention = {view.attention: view.movement() for view in views}
    views = [view.shown_as(what) for view in views for what in shown(view.attention, args)]
    if is_picture(args.out):
        sizes = (args.layers or MOST_LAYERS, args.heads or MOST_HEADS)
        figures: draw.Figures = {view.part: view.figure(*sizes) for view in views}
        figures["movement"] = draw.draw_movement(by_attention)
        print(*draw.save(figures, args.out, args.overwrite), sep="\n")
    else:
        with whole_or_not_at_all(args.out, args.overwrite) as part:
            if args.out.suffix.lower() == ".html":
                page = as_page(views, args.title(args), args.layers, args.heads)
                part.write_text(page, encoding="utf-8")
            else:
                with part.open("wb") as file:  # numpy would add .npz to a path
                    np.savez_compressed(file, **arrays(views))
        print(args.out)
    for attention, models in by_attention.items():
        for name, layers in models.items():
            heading = f"{attention}, {name}" if args.compare else attention
            print(f"\n{heading}\n{table(layers)}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ea_maps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="sentence | image | series")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--out", type=Path, default=Path("maps.png"), help=".png, .svg, .pdf, .html or .npz"
    )
    add_overwrite(common)
    for what, most in (("layers", MOST_LAYERS), ("heads", MOST_HEADS)):
        default = f"to show at most (default: {most} in a picture, all in a page)"
        common.add_argument(f"--{what}", type=positive, help=default)
    common.add_argument(
        "--show",
        nargs="+",
        choices=[HEADS, *SUMMARIES],
        default=[HEADS],
        metavar="WHAT",
        help="heads (default), rollout, flow: how much of a token comes from which token of the "
        "input, through all layers below (Abnar and Zuidema, 2020)",
    )
    common.add_argument(
        "--names",
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="headings of the two models (default: evolving or plain, as they are)",
    )

    command = commands.add_parser(
        "sentence", parents=[common], help="a checkpoint of fairseq or transformers"
    )
    command.add_argument(
        "checkpoint", type=Path, help="fairseq's file, or transformers' folder or name"
    )
    command.add_argument(
        "sentence", help="for fairseq tokenised and in BPE, like the training data"
    )
    command.add_argument("--target", help="its translation, likewise; default: the model's own")
    command.add_argument("--data", type=Path, help="fairseq's data-bin, if it has moved since")
    command.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="evolving or plain")
    command.set_defaults(run=sentence, title=lambda args: f"{args.checkpoint}: {args.sentence}")

    command = commands.add_parser("image", parents=[common], help="a timm model")
    command.add_argument("model", help="ea_*, or a plain ViT or DeiT")
    command.add_argument("image", type=Path)
    command.add_argument("--checkpoint", default="", help="default: random weights")
    options = {"action": "append", "type": name_value, "metavar": "NAME=VALUE"}
    command.add_argument(
        "--option", default=[], **options, help="of timm.create_model, as img_size=32"
    )
    command.add_argument("--compare", metavar="MODEL", help="a second model")
    command.add_argument("--compare-checkpoint", default="", metavar="CHECKPOINT")
    command.add_argument("--compare-option", **options, help="default: those of --option")
    command.set_defaults(run=image, title=lambda args: f"{args.model}: {args.image.name}")

    command = commands.add_parser(
        "series", parents=[common], help="an estimator of ea_aeon, or a fairseq checkpoint"
    )
    command.add_argument("model", type=Path)
    command.add_argument("dataset")
    command.add_argument("--folder", help="holds DATASET/DATASET_TEST.ts; default: from aeon")
    command.add_argument("--split", choices=["train", "test"], default="test")
    command.add_argument("--case", type=int, default=0, help="number of the series (default: 0)")
    command.add_argument(
        "--member", type=int, default=0, help="number of the network, if there are several"
    )
    command.add_argument("--compare", type=Path, metavar="MODEL", help="a second model")
    command.set_defaults(
        run=series,
        title=lambda args: f"{args.model}: {args.dataset}, {args.split} case {args.case}",
    )
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        # The parts of a sentence's picture depend on the model.
        check_paths(args, {} if args.run is sentence else {"self-attention": None})
        if args.names and args.names[0] == args.names[1]:
            raise ValueError(f"--names must differ, got {args.names[0]} twice")
        write(args, args.run(args))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"ea_maps: error: {error}")


if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq turns it on
    main()
