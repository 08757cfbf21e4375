#!/usr/bin/env python3
"""``ea_resnet*`` beside timm's ResNet, and beside itself without evolution.

    python benchmarks/resnet.py --json resnet.json --markdown resnet.md

At alpha = beta = 0 there is attention beside the convolutions, but its maps do not evolve.
"""

from __future__ import annotations

import timm
from common import LITERAL, OURS
from images import run
from literal import make_literal
from torch import nn

import ea_timm  # noqa: F401 (registers the models)


def build(name: str, image_size: int) -> dict[str, nn.Module]:
    plain = timm.create_model(name)
    ours = timm.create_model(f"ea_{name}", img_size=image_size)
    ours.load_state_dict(plain.state_dict())
    still = timm.create_model(f"ea_{name}", img_size=image_size, alpha=0.0, beta=0.0)
    weights = {key: x for key, x in ours.state_dict().items() if ".evolution." not in key}
    still.load_state_dict(weights, strict=False)
    return {
        "timm": plain,
        "ours, alpha = beta = 0": still,
        OURS: ours,
        LITERAL: make_literal(ours),
    }


def main(argv: list[str] | None = None) -> None:
    run(__doc__, build, ("resnet50", "resnet101", "resnet152"), ("resnet50",), argv)


if __name__ == "__main__":
    main()
