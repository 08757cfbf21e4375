#!/usr/bin/env python3
"""Measures the time series network, with the classifier's defaults, by the length of the series.

    python benchmarks/time_series.py --lengths 50 206 896 1751 --rounds 3 --markdown series.md

A training step has one batch. Its gradients are computed for as many series at once as the
classifier chooses. The sides: convolutions only, plain attention (alpha = beta = 0), ours, and ours
with activation checkpointing.
"""

from __future__ import annotations

import warnings

import torch
from common import OURS, Report, Step, make_parser, parse, training
from torch import Tensor, nn

from ea_aeon import EADCTransformerClassifier
from ea_aeon.estimators import NETWORK_OPTIONS
from ea_aeon.network import DCTransformer
from evolving_attention.commands import positive

SIDES = {
    "convolutions": {"attention_dim": 0},
    "plain": {"alpha": 0.0, "beta": 0.0},
    OURS: {},
    f"{OURS}, checkpointing": {"checkpoint_activations": True},
}


def build(options: dict, length: int, channels: int, batch_size: int) -> tuple[nn.Module, int]:
    """The network of the classifier with these options, and how many series it takes at once."""
    classifier = EADCTransformerClassifier(**options)
    network_options = {name: getattr(classifier, name) for name in NETWORK_OPTIONS}
    network = DCTransformer(channels * 2, 4, length, **network_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says it
        at_once = classifier.series_at_once(batch_size, length, 2 * len(network.blocks))
    return network, at_once


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[50, 100, 206, 400, 896, 1751],
        help="default: 50 100 206 400 896 1751",
    )
    parser.add_argument("--channels", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    args = parse(parser, argv)
    report = Report(args, "series")
    for length in args.lengths:
        series = torch.randn(args.batch_size, length, 2 * args.channels, device=args.device)
        steps: dict[str, Step] = {}
        most = 0
        for side, options in SIDES.items():
            network, at_once = build(options, length, args.channels, args.batch_size)
            parts = series.split(at_once)
            part_steps = [training(network.to(args.device), loss_of(part), args) for part in parts]
            steps[side] = all_of(part_steps)
            most = at_once if side == OURS else most
        report.measure(f"{length} steps, {most} series at once", steps, args.batch_size)
    report.print()


def loss_of(series: Tensor):
    lengths = torch.full((len(series),), series.size(1), device=series.device)

    def loss(network: nn.Module) -> Tensor:
        return network(series, lengths).square().mean()

    return loss


def all_of(steps: list[Step]) -> Step:
    def step() -> None:
        for one in steps:
            one()

    return step


if __name__ == "__main__":
    main()
