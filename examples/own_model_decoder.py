#!/usr/bin/env python3
"""A decoder of your own with evolving attention: causal and cross windows, a cache, beam search.

python examples/own_model_decoder.py

It learns to write a row of digits backwards, and then checks that decoding step by step equals the
whole pass, also after a beam was reordered and after tokens were taken back: docs/own_model.md.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolving_attention import AttentionEvolution, AttentionProbe

WORDS, PAD, START, LONGEST = 12, 0, 1, 7
Rows = Optional[Tensor]  # of AttentionEvolution.step: None at the start and in the first layer
Maps = Tuple[Optional[Tensor], Optional[Tensor]]  # of self- and cross-attention


class Cache(NamedTuple):
    """What a layer keeps of earlier tokens. A step returns a new one and leaves this as it is."""

    past: Tensor  # (B, T, dim), from which keys and values are made
    rows: Rows = None
    cross_rows: Rows = None


def reorder(caches: List[Cache], order: Tensor) -> List[Cache]:
    """For beam search: sentence i goes on from what sentence order[i] was."""
    return [Cache(*(None if x is None else x[order] for x in cache)) for cache in caches]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, window: str, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.evolution = None if first else AttentionEvolution(heads, 0.1, 0.1, window=window)
        self.probe = AttentionProbe()

    def forward(
        self, x: Tensor, memory: Tensor, hidden: Tensor, prev: Optional[Tensor], rows: Rows
    ) -> Tuple[Tensor, Tensor, Rows]:
        """x (B, T, dim), memory (B, S, dim); hidden: keys not to be seen, for (B, H, T, S)."""
        q, k, v = (
            project(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        attn_logits = q @ k.transpose(2, 3) * q.size(3) ** -0.5
        if self.evolution is not None:  # a step from the start is the whole pass
            attn_logits, rows = self.evolution.step(attn_logits, prev, hidden, rows)
        probs = self.probe(attn_logits.masked_fill(hidden, -torch.inf).softmax(3), attn_logits)
        return self.out((probs @ v).transpose(1, 2).flatten(2)), attn_logits, rows


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, first: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads, "causal", first)
        self.cross_attn = Attention(dim, heads, "cross", first)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, source: Tensor, hidden: Tensor, maps: Maps, cache: Cache
    ) -> Tuple[Tensor, Maps, Cache]:
        y = self.norms[0](x)
        past = torch.cat([cache.past, y], dim=1)
        future = x.new_ones(x.size(1), past.size(1)).triu(1 + cache.past.size(1)).bool()
        y, self_map, rows = self.self_attn(y, past, future, maps[0], cache.rows)
        x = x + y
        y = self.norms[1](x)
        y, cross_map, cross_rows = self.cross_attn(y, source, hidden, maps[1], cache.cross_rows)
        x = x + y
        return x + self.ffn(self.norms[2](x)), (self_map, cross_map), Cache(past, rows, cross_rows)


class Decoder(nn.Module):
    def __init__(self, dim: int = 48, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, dim), nn.Embedding(LONGEST + 1, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, index == 0) for index in range(layers))
        self.head = nn.Linear(dim, WORDS)

    def forward(
        self, source: Tensor, tokens: Tensor, caches: Optional[List[Cache]] = None
    ) -> Tuple[Tensor, List[Cache]]:
        """Source (B, S); tokens (B, T), which go on from the caches -> scores (B, T, WORDS)."""
        memory = self.words(source) + self.places.weight[: source.size(1)]
        if caches is None:
            caches = [Cache(memory[:, :0])] * len(self.layers)
        start = caches[0].past.size(1)
        x = self.words(tokens) + self.places.weight[start : start + tokens.size(1)]
        maps, new, hidden = (None, None), [], (source == PAD)[:, None, None, :]
        for layer, cache in zip(self.layers, caches, strict=True):
            x, maps, cache = layer(x, memory, hidden, maps, cache)
            new.append(cache)
        return self.head(x), new


def pairs(count: int) -> Tuple[Tensor, Tensor]:
    """Rows of digits, padded on the right, and START with the same rows backwards."""
    rows = [torch.randint(2, WORDS, (int(n),)) for n in torch.randint(3, LONGEST + 1, (count,))]
    turned = [torch.cat([torch.tensor([START]), row.flip(0)]) for row in rows]
    return tuple(nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, turned))


def main() -> None:
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        source, target = pairs(32)
        scores, _ = model(source, target[:, :-1])
        loss = F.cross_entropy(scores.transpose(1, 2), target[:, 1:], ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert loss < 0.5, "the model has not learned its task"
    check(model.eval(), *pairs(64))
    print(f"Loss {loss.item():.3f}. Steps, reordered beams and tokens taken back are right.")


@torch.no_grad()
def check(model: Decoder, source: Tensor, target: Tensor) -> None:
    whole, _ = model(source, target)
    caches = None
    for place in range(4):  # one token at a time
        scores, caches = model(source, target[:, place : place + 1], caches)
        torch.testing.assert_close(scores[:, 0], whole[:, place], atol=1e-4, rtol=1e-4)

    order = torch.randint(len(source), (len(source),))
    scores, _ = model(source[order], target[order, 4:5], reorder(caches, order))
    torch.testing.assert_close(scores[:, 0], whole[order, 4], atol=1e-4, rtol=1e-4)

    # Three tokens are guessed, of which the last two are wrong: go on from the caches of before.
    guess = target[:, 4:7].clone()
    guess[:, 1:] = START
    model(source, guess, caches)
    scores, _ = model(source, target[:, 4:6], caches)
    torch.testing.assert_close(scores, whole[:, 4:6], atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
