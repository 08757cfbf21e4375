#!/usr/bin/env python3
"""Training step of ``ea_roberta_*`` beside fairseq's ``roberta_*``: masked language modelling.

python benchmarks/roberta.py --json roberta.json --markdown roberta.md
python benchmarks/roberta.py --sentences 8 --length 512 --dtype bfloat16
"""

from __future__ import annotations

import torch
from common import Report, make_parser, parse, positive, training
from fairseq.models.roberta import RobertaModel
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq_models import architectures, build, make_dictionary
from torch import Tensor, nn
from torch.nn import functional as F


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--arch",
        choices=architectures(RobertaModel),
        default="roberta_base",
        help="fairseq's (default: %(default)s); ours is ea_*",
    )
    parser.add_argument("--layers", type=positive, help="default: the architecture's")
    parser.add_argument("--vocabulary", type=positive, default=50_265, help="default: %(default)s")
    parser.add_argument("--sentences", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--length", type=positive, default=128, help="default: %(default)s")
    args = parse(parser, argv)

    dictionary = make_dictionary(args.vocabulary)
    task = MaskedLMTask(MaskedLMConfig(tokens_per_sample=args.length), dictionary)
    options = {"encoder_layers": args.layers} if args.layers else {}
    models = build(args.arch, task, args.device, **options)
    shape = (args.sentences, args.length)
    tokens = torch.randint(dictionary.nspecial, len(dictionary), shape, device=args.device)
    masked = torch.rand(shape, device=args.device) < 0.15

    def loss(model: nn.Module) -> Tensor:
        logits = model(tokens, masked_tokens=masked)[0]
        return F.cross_entropy(logits, tokens[masked])

    report = Report(args, "tokens")
    report.measure(
        f"{args.arch}, training, {args.sentences} sentences of {args.length} tokens",
        {side: training(model, loss, args) for side, model in models.items()},
        tokens.numel(),
    )
    report.print()


if __name__ == "__main__":
    main()
