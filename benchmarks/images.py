"""Shared by the benchmarks of timm's models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from common import Report, inference, make_parser, parse, positive, training
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 1000


def run(
    doc: str,
    build: Callable[[str, int], dict[str, nn.Module]],
    models: Sequence[str],
    default: Sequence[str],
    argv: list[str] | None,
) -> None:
    """A benchmark of image classification: training and inference of all sides of each model.

    Args:
        doc: of the script.
        build: creates the sides of a model from its name and the image size.
        models: names to choose from.
        default: names that are measured by default.
        argv: the script's arguments.
    """
    parser = make_parser(doc)
    parser.add_argument("--models", nargs="+", choices=models, default=default)
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--image-size", type=positive, default=224, help="default: %(default)s")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("training", "inference"),
        default=("training", "inference"),
        help="default: both",
    )
    args = parse(parser, argv)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(shape, device=args.device)
    labels = torch.randint(CLASSES, shape[:1], device=args.device)

    def forward(model: nn.Module) -> Tensor:
        return model(images)

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(forward(model), labels)

    report = Report(args, "images")
    for name in args.models:
        sides = {
            side: model.to(args.device) for side, model in build(name, args.image_size).items()
        }
        for mode in args.mode:
            step, call = (training, loss) if mode == "training" else (inference, forward)
            steps = {side: step(model, call, args) for side, model in sides.items()}
            report.measure(f"{name}, {mode}", steps, args.batch_size)
    report.print()
