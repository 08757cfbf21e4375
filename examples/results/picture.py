"""Draws the README's first picture: the same heads over the layers, evolving above plain.

    python examples/results/run.py images --data FOLDER --seeds 1 --settings evolving plain \\
        --out again --keep weights
    python examples/results/picture.py --weights weights --out maps.png

The models are a pair of the experiment with images, and the image is one of the test. What is drawn
is where the class token looks.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict

import torch
from experiments import EXPERIMENTS
from run import kept
from with_timm import CLASSES, normalise

from ea_maps.draw import Look, Picture, draw_over_image
from evolving_attention import collect_maps
from evolving_attention.commands import add_overwrite, check_output, whole_or_not_at_all

SETTINGS = ("evolving", "plain")
HEADS = 2  # of each model, the first ones


def look_of(weights: Path, setting: str, seed: int, image: torch.Tensor) -> Look:
    """The maps of one model for an image, (3, 32, 32) of bytes; prints what the model says."""
    experiment = EXPERIMENTS["images"]
    model = experiment.create(experiment.settings[setting], seed).eval()
    path = kept(weights, (experiment, setting, seed))
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad(), collect_maps(model) as maps:
        probs = model(normalise(image.unsqueeze(0))).softmax(dim=1)[0]
    print(f"{setting}: {CLASSES[probs.argmax()]}, {probs.max():.0%}")
    grids = {attention.name: model.patch_embed.grid_size for attention in maps}
    seen = (image.permute(1, 2, 0) / 255).numpy()
    return Look(seen, maps, grids, model.num_prefix_tokens, 0, seen.shape[:2])


def draw(looks: Dict[str, Look]) -> Picture:
    """A row for each head of each model, a column for each layer."""
    layers = len(looks["evolving"].maps)
    size = (1.1 * layers + 0.6, 1.1 * HEADS * len(looks) + 0.5)
    figure = Picture(figsize=size, layout="compressed")
    for part, (name, look) in zip(figure.subfigures(len(looks)), looks.items(), strict=True):
        part.supylabel(name, fontweight="bold", fontsize=11)
        axes = part.subplots(HEADS, layers, squeeze=False)
        for head, row in enumerate(axes):
            for layer, (axis, attention) in enumerate(zip(row, look.maps, strict=True)):
                draw_over_image(axis, look, attention, head)
                if head == 0:
                    axis.set_title(f"layer {layer + 1}", fontsize=9, pad=3)
            row[0].set_ylabel(f"head {head + 1}", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="what run.py --keep wrote")
    parser.add_argument("--work", type=Path, default=Path("results-work"), help="run.py's --work")
    parser.add_argument("--out", type=Path, required=True, help=".png")
    parser.add_argument("--seed", type=int, default=1, help="of the pair (default: 1)")
    parser.add_argument("--image", type=int, default=0, help="number of the test image")
    add_overwrite(parser)
    args = parser.parse_args()
    try:
        if args.out.suffix.lower() != ".png":
            raise ValueError(f"--out must end in .png, got {args.out}")
        check_output(args.out, args.overwrite)
        *_, images, labels = torch.load(args.work / "cifar10.pt", weights_only=True)
        if not 0 <= args.image < len(images):
            raise ValueError(f"--image must lie in [0, {len(images) - 1}], got {args.image}")
        print(f"the image shows: {CLASSES[labels[args.image]]}")
        image = images[args.image]
        looks = {name: look_of(args.weights, name, args.seed, image) for name in SETTINGS}
        with whole_or_not_at_all(args.out, args.overwrite) as part:
            draw(looks).savefig(part, dpi=150, bbox_inches="tight", format="png")
    except (OSError, ValueError) as error:
        sys.exit(f"picture.py: error: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
