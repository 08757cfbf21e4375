#!/usr/bin/env python3
"""``ea_vit_*`` and ``ea_deit_*`` beside timm's own, with and without fused attention.

python benchmarks/vit.py --json vit.json --markdown vit.md
python benchmarks/vit.py --models deit_small --mode training --batch-size 64 --dtype bfloat16
"""

from __future__ import annotations

from copy import deepcopy

import timm
from common import LITERAL, OURS
from images import run
from literal import make_literal
from torch import nn

import ea_timm  # noqa: F401 (registers the models)

MODELS = [f"{family}_{size}" for family in ("vit", "deit") for size in ("tiny", "small", "base")]


def build(name: str, image_size: int) -> dict[str, nn.Module]:
    plain = timm.create_model(f"{name}_patch16_224", img_size=image_size)
    unfused = deepcopy(plain)
    for block in unfused.blocks:
        block.attn.fused_attn = False
    ours = timm.create_model(f"ea_{name}", img_size=image_size)
    ours.load_state_dict(plain.state_dict())
    return {
        "timm": plain,
        "timm, not fused": unfused,
        OURS: ours,
        LITERAL: make_literal(ours),
    }


def main(argv: list[str] | None = None) -> None:
    run(__doc__, build, MODELS, ("deit_tiny", "deit_small", "deit_base"), argv)


if __name__ == "__main__":
    main()
