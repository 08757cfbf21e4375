#!/usr/bin/env python3
"""Measures how time and memory of attention grow with the sequence length and the heads.

    python benchmarks/growth.py --json growth.json --markdown growth.md --plot growth.png

The training steps are of a few layers of nothing but attention: softmax attention written out,
torch's fused kernel, ours, and the literal reference.
"""

from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path

import torch
from common import LITERAL, MEBIBYTE, OURS, Report, machine, make_parser, parse, training
from literal import make_literal
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.nn import functional as F

from evolving_attention import AttentionEvolution
from evolving_attention.commands import positive

HEAD_DIM = 64
# Colours of Okabe and Ito, for colour-blind readers; lines and markers differ, too.
STYLES = {
    "softmax": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "fused": {"color": "#009E73", "marker": "s", "linestyle": "--"},
    OURS: {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    LITERAL: {"color": "#000000", "marker": "x", "linestyle": ":"},
}


class Attention(nn.Module):
    """Layers of self-attention without projections: (batch, heads, length, HEAD_DIM)."""

    def __init__(self, layers: int, heads: int, fused: bool = False, evolves: bool = False) -> None:
        super().__init__()
        self.layers = layers
        self.fused = fused
        self.evolutions = nn.ModuleList(
            AttentionEvolution(heads, alpha=0.5, beta=0.5)
            for _ in range(layers - 1 if evolves else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        attn_logits = None
        for index in range(self.layers):
            if self.fused:
                x = x + F.scaled_dot_product_attention(x, x, x)
                continue
            prev_attn_logits = attn_logits
            attn_logits = (x * HEAD_DIM**-0.5) @ x.transpose(2, 3)
            if self.evolutions and index > 0:
                attn_logits = self.evolutions[index - 1](attn_logits, prev_attn_logits)
            x = x + attn_logits.softmax(dim=-1) @ x
        return x


def build(layers: int, heads: int) -> dict[str, nn.Module]:
    ours = Attention(layers, heads, evolves=True)
    return {
        "softmax": Attention(layers, heads),
        "fused": Attention(layers, heads, fused=True),
        OURS: ours,
        LITERAL: make_literal(ours),
    }


def plot(axes: dict[str, dict[int, dict]], title: str, path: Path) -> None:
    """A row of panels for each axis: median time and peak memory over its values."""
    figure = Figure(figsize=(9, 3.6 * len(axes)), layout="constrained")
    panels = figure.subplots(len(axes), 2, squeeze=False)
    for row, (axis, results) in zip(panels, axes.items(), strict=True):
        for side, style in STYLES.items():
            of_side = [result[side] for result in results.values()]
            times = [1000 * statistics.median(result["seconds"]) for result in of_side]
            memory = [result["peak_bytes"] / MEBIBYTE for result in of_side]
            row[0].plot(list(results), times, label=side, **style)
            row[1].plot(list(results), memory, label=side, **style)
        for panel, label in zip(row, ("time of a step, ms", "peak memory, MiB"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            panel.set_xticks(list(results), labels=map(str, results))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[64, 128, 256, 512, 1024, 2048],
        help="default: 64 128 256 512 1024 2048",
    )
    parser.add_argument(
        "--heads", type=positive, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16"
    )
    parser.add_argument(
        "--length", type=positive, default=256, help="over heads (default: %(default)s)"
    )
    parser.add_argument(
        "--num-heads", type=positive, default=4, help="over lengths (default: %(default)s)"
    )
    parser.add_argument("--layers", type=positive, default=4, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw both there (.png, .svg)")
    args = parse(parser, argv)
    formats = Figure().canvas.get_supported_filetypes()
    if args.plot and args.plot.suffix[1:] not in formats:
        parser.error(f"--plot {args.plot}: the name must end in one of .{', .'.join(formats)}")
    report = Report(args, "tokens")

    @cache  # the two axes cross
    def measure(length: int, heads: int) -> dict[str, dict]:
        shape = (args.batch_size, heads, length, HEAD_DIM)
        x = torch.randn(shape, device=args.device)

        def loss(model: nn.Module) -> Tensor:
            return model(x.detach().requires_grad_()).square().mean()

        models = build(args.layers, heads)
        steps = {
            side: training(model.to(args.device), loss, args) for side, model in models.items()
        }
        return report.measure(f"length {length}, {heads} heads", steps, args.batch_size * length)

    axes = {
        f"length ({args.num_heads} heads)": {
            length: measure(length, args.num_heads) for length in sorted(args.lengths)
        },
        f"heads (length {args.length})": {
            heads: measure(args.length, heads) for heads in sorted(args.heads)
        },
    }
    report.print()
    if args.plot:
        plot(axes, f"{machine(args.device)}, {args.dtype}", args.plot)


if __name__ == "__main__":
    main()
