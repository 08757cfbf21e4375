#!/usr/bin/env python3
"""Training step of ``ea_transformer`` beside fairseq's ``transformer`` of the same size.

    python benchmarks/translation.py --arch transformer_iwslt_de_en --sentences 64 --length 30

Both sides take turns within one run, so that a machine's moods meet both; quote the ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ea_fairseq  # noqa: F401 (registers the models)


def build(arch: str, vocabulary: int, device: str) -> torch.nn.Module:
    dictionary = Dictionary()
    for index in range(vocabulary - dictionary.nspecial):
        dictionary.add_symbol(f"w{index}")
    args = argparse.Namespace(share_all_embeddings=True)
    ARCH_CONFIG_REGISTRY[arch](args)
    task = TranslationTask(TranslationConfig(), dictionary, dictionary)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, task).to(device).train()


def step(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    synchronize = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    lengths = torch.full((len(tokens),), tokens.size(1), device=tokens.device)
    model.zero_grad()
    synchronize()
    start = time.perf_counter()
    logits = model(tokens, lengths, tokens)[0]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="transformer_iwslt_de_en", help="fairseq's; ours is ea_*")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--length", type=int, default=30, help="tokens of either side")
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    models = [build(arch, args.vocabulary, args.device) for arch in (args.arch, f"ea_{args.arch}")]
    shape = (args.sentences, args.length)
    tokens = torch.randint(4, args.vocabulary, shape, device=args.device)
    times = [[step(model, tokens) for model in models] for _ in trange(args.runs + 2)][2:]
    plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(ours / plain for plain, ours in times)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, median of {args.runs}")
    print(f"{args.arch:>36}  {tokens.numel() / plain:8.0f} tokens/s")
    print(f"{'ea_' + args.arch:>36}  {tokens.numel() / ours:8.0f} tokens/s")
    print(f"time ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
