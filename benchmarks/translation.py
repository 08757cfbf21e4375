#!/usr/bin/env python3
"""``ea_transformer_*`` beside fairseq's ``transformer_*``: training steps and beam search.

    python benchmarks/translation.py --json translation.json --markdown translation.md
    python benchmarks/translation.py --mode generation --lengths 16 32 64 128 256

The weights are random and the sentences are made up. Beam search is fairseq's. It must generate a
fixed number of tokens, so that all sides do the same work; the source is as long as the
translation. The time in the table is that of one step, which generates one token of every sentence.
"""

from __future__ import annotations

import torch
from common import LITERAL, OURS, Report, Step, inference, make_parser, parse, positive, training
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq_models import PLAIN, architectures, build, make_dictionary
from torch import Tensor, nn
from torch.nn import functional as F

BEAM = 5


def draw(dictionary: Dictionary, lengths: Tensor, left_pad: bool = False) -> Tensor:
    """Random sentences of these lengths, (batch, longest), padded as in fairseq."""
    longest = int(lengths.max())
    shape = (len(lengths), longest)
    tokens = torch.randint(dictionary.nspecial, len(dictionary), shape, device=lengths.device)
    position = torch.arange(longest, device=lengths.device)
    if left_pad:
        position = position.flip(0)
    return tokens.masked_fill(position >= lengths.unsqueeze(1), dictionary.pad())


def measure_training(models: dict[str, nn.Module], task: TranslationTask, report: Report) -> None:
    args = report.args
    # fairseq makes batches of sentences of similar length, and pads the shorter ones.
    shortest = (4 * args.length + 4) // 5
    lengths = torch.linspace(shortest, args.length, args.sentences, device=args.device)
    lengths = lengths.round().long()
    source = draw(task.source_dictionary, lengths, left_pad=True)
    target = draw(task.target_dictionary, lengths)

    def loss(model: nn.Module) -> Tensor:
        logits = model(source, lengths, target)[0]
        pad = task.target_dictionary.pad()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=pad)

    report.measure(
        f"{args.arch}, training, {args.sentences} sentences of {shortest} to {args.length} tokens",
        {side: training(model, loss, args) for side, model in models.items()},
        int(lengths.sum()),
    )


def measure_generation(
    models: dict[str, nn.Module], task: TranslationTask, report: Report, length: int
) -> None:
    args = report.args
    lengths = torch.full((args.generation_sentences,), length, device=args.device)
    source = draw(task.source_dictionary, lengths)
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    before_eos = length - 1

    def step(model: nn.Module) -> Step:
        generator = SequenceGenerator(
            [model],
            task.target_dictionary,
            beam_size=BEAM,
            max_len_a=0,
            max_len_b=before_eos,
            min_len=before_eos,
        )
        return inference(model, lambda model: generator.generate([model], sample), args)

    report.measure(
        f"{args.arch}, beam {BEAM}, {args.generation_sentences} sentences of {length} tokens",
        {side: step(models[side]) for side in (PLAIN, OURS)},
        items=length * args.generation_sentences,
        calls=length,
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--arch",
        choices=architectures(TransformerModel),
        default="transformer_iwslt_de_en",
        help="fairseq's (default: %(default)s); ours is ea_*",
    )
    parser.add_argument("--vocabulary", type=positive, default=10_000, help="default: %(default)s")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("training", "generation"),
        default=("training", "generation"),
        help="default: both",
    )
    parser.add_argument(
        "--sentences", type=positive, default=64, help="of a training step (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=positive, default=30, help="of the longest of them (default: %(default)s)"
    )
    parser.add_argument(
        "--generation-sentences", type=positive, default=8, help="default: %(default)s"
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[16, 32, 64, 128, 256],
        help="tokens to generate (default: 16 32 64 128 256)",
    )
    args = parse(parser, argv)

    dictionary = make_dictionary(args.vocabulary)
    task = TranslationTask(TranslationConfig(), dictionary, dictionary)
    models = build(args.arch, task, args.device, share_all_embeddings=True)
    report = Report(args, "tokens")
    if "training" in args.mode:
        measure_training(models, task, report)
    del models[LITERAL]  # its decoding steps would be ours
    if "generation" in args.mode:
        for model in models.values():
            model.make_generation_fast_(beamable_mm_beam_size=BEAM)
        for length in args.lengths:
            measure_generation(models, task, report, length)
    report.print()


if __name__ == "__main__":
    main()
