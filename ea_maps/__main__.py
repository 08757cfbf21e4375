"""Draws and measures how attention maps evolve, for one sentence, image or time series.

    python -m ea_maps sentence checkpoint_best.pt "zwei junge männer im frei@@ en ." --out maps.png
    python -m ea_maps image ea_deit_small photo.jpg --checkpoint model_best.pth.tar
    python -m ea_maps series vowels.pt JapaneseVowels --case 3

Writes a picture of the maps, with layers from top to bottom and heads from left to right. Another
one, maps-movement.png, shows the entropy of each layer's maps and their Jensen-Shannon distance
from the previous layer's, which are also printed as a table. --compare puts a second model,
evolving or plain, beside the first.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import matplotlib

from ea_maps import draw
from ea_maps.measure import Movement, movement, table
from evolving_attention.commands import add_overwrite, name_value, positive

Movements = Dict[str, Dict[str, List[Movement]]]


def sentence(args: argparse.Namespace) -> Tuple[draw.Figures, Movements]:
    from ea_maps.sentence import axes_of, encode, is_translation, load, maps_of, translate

    checkpoint = load(args.checkpoint, args.data)
    source = encode(checkpoint, args.sentence)
    target = None
    if is_translation(checkpoint):
        target = encode(checkpoint, args.target, True) if args.target else None
        target = translate(checkpoint, source) if target is None else target
    elif args.target:
        raise ValueError("--target: this model does not translate")
    axes = axes_of(checkpoint, source, target)
    parts = [attention if len(axes) > 1 else None for attention in axes]
    draw.check_paths(args.out, parts, args.overwrite)
    models = {args.names[0]: maps_of(checkpoint, source, target)}
    if args.compare:
        other = load(args.compare, args.data)
        if axes != axes_of(other, source, target):
            raise ValueError(f"--compare: {args.compare} has a different dictionary")
        models[args.names[1]] = maps_of(other, source, target)
    figures: draw.Figures = {}
    found: Movements = {}
    for part, (attention, (queries, keys)) in zip(parts, axes.items(), strict=True):
        picked = {name: maps[attention] for name, maps in models.items()}
        figures[part] = draw.draw_tokens(picked, queries, keys, args.layers, args.heads)
        found[attention] = {name: movement(maps) for name, maps in picked.items()}
    return figures, found


def image(args: argparse.Namespace) -> Tuple[draw.Figures, Movements]:
    from PIL import Image, UnidentifiedImageError

    from ea_maps.image import load, look

    if not args.compare and (args.compare_checkpoint or args.compare_option):
        raise ValueError("--compare-checkpoint and --compare-option need a model: --compare MODEL")
    if args.compare and bool(args.checkpoint) != bool(args.compare_checkpoint):
        raise ValueError(
            "--checkpoint and --compare-checkpoint must be given together: comparing trained "
            "weights with random ones shows nothing"
        )
    try:
        picture = Image.open(args.image)
    except UnidentifiedImageError:
        raise ValueError(f"{args.image} is not an image") from None
    try:
        picture.load()
    except OSError as error:
        raise ValueError(f"{args.image} is damaged: {error}") from None
    sides = [(args.model, args.checkpoint, dict(args.option))]
    if args.compare:
        options = args.option if args.compare_option is None else args.compare_option
        sides.append((args.compare, args.compare_checkpoint, dict(options)))
    looks = {
        name: look(load(model, checkpoint, **options), picture, options.get("img_size"))
        for name, (model, checkpoint, options) in zip(args.names, sides, strict=False)
    }
    figures = {None: draw.draw_image(looks, args.layers, args.heads)}
    return figures, {"self-attention": {name: movement(one.maps) for name, one in looks.items()}}


def series(args: argparse.Namespace) -> Tuple[draw.Figures, Movements]:
    from ea_aeon.data import read
    from ea_maps.series import load, look

    cases = read(args.dataset, args.split, args.folder).series
    if not 0 <= args.case < len(cases):
        raise ValueError(f"--case must lie in [0, {len(cases) - 1}], got {args.case}")
    seen, maps = look(*load(args.model), cases[args.case])
    models = {args.names[0]: maps}
    if args.compare:
        models[args.names[1]] = look(*load(args.compare), cases[args.case])[1]
    figures = {None: draw.draw_series(models, seen.numpy(), args.layers, args.heads)}
    return figures, {"self-attention": {name: movement(maps) for name, maps in models.items()}}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ea_maps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="sentence | image | series")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=Path("maps.png"), help=".png, .svg or .pdf")
    add_overwrite(common)
    common.add_argument("--layers", type=positive, default=6, help="to draw at most (default: 6)")
    common.add_argument("--heads", type=positive, default=4, help="to draw at most (default: 4)")
    common.add_argument(
        "--names",
        nargs=2,
        default=["evolving", "plain"],
        metavar=("FIRST", "SECOND"),
        help="headings of the two models (default: evolving plain)",
    )

    command = commands.add_parser(
        "sentence", parents=[common], help="a fairseq checkpoint, translation or RoBERTa"
    )
    command.add_argument("checkpoint", type=Path)
    command.add_argument("sentence", help="tokenised and in BPE, like the training data")
    command.add_argument("--target", help="its translation, also in BPE; default: the model's own")
    command.add_argument("--data", type=Path, help="data-bin, if it has moved since the training")
    command.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="evolving or plain")
    command.set_defaults(run=sentence)

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
    command.set_defaults(run=image)

    command = commands.add_parser(
        "series", parents=[common], help="an estimator of ea_aeon, or a fairseq checkpoint"
    )
    command.add_argument("model", type=Path)
    command.add_argument("dataset")
    command.add_argument("--folder", help="holds DATASET/DATASET_TEST.ts; default: from aeon")
    command.add_argument("--split", choices=["train", "test"], default="test")
    command.add_argument("--case", type=int, default=0, help="number of the series (default: 0)")
    command.add_argument("--compare", type=Path, metavar="MODEL", help="a second model")
    command.set_defaults(run=series)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        parts = ["movement"] if args.run is sentence else [None, "movement"]
        draw.check_paths(args.out, parts, args.overwrite)
        if args.names[0] == args.names[1]:
            raise ValueError(f"--names must differ, got {args.names[0]} twice")
        with matplotlib.rc_context({"font.family": draw.fonts()}):
            figures, found = args.run(args)
            figures["movement"] = draw.draw_movement(found)
            print(*draw.save(figures, args.out, args.overwrite), sep="\n")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"ea_maps: error: {error}")
    for attention, models in found.items():
        for name, layers in models.items():
            heading = f"{attention}, {name}" if args.compare else attention
            print(f"\n{heading}\n{table(layers)}")


if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq turns it on
    main()
