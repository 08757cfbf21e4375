#!/usr/bin/env python3
"""An encoder of your own with evolving attention: four layers, padding, maps.

python examples/own_model_encoder.py

It learns, in seconds, to say for each token how often that token occurs in its sentence, and then
checks that padding changes nothing. docs/own_model.md explains what is special about it.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolving_attention import AttentionEvolution, AttentionProbe, collect_maps

WORDS, PAD, LONGEST, MOST = 12, 0, 12, 3  # counts of MOST and more are one class


class SelfAttention(nn.Module):
    """Multi-head self-attention whose map evolves from that of the previous layer."""

    def __init__(self, dim: int, heads: int, evolution: Optional[AttentionEvolution]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.evolution = evolution  # None in the first layer, which has no previous map
        self.probe = AttentionProbe()  # collect_maps reads the map here
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, padding: Tensor, prev_attn_logits: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """x (B, T, dim), padding (B, T) -> (B, T, dim) and the map to hand on, (B, H, T, T)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, T, dim / H)
        attn_logits = q @ k.transpose(2, 3) * q.size(3) ** -0.5
        hidden = padding[:, None, None, :]  # keys that no query may see
        absent = hidden | padding[:, None, :, None]  # cells whose query or key is padding
        if self.evolution is not None:
            attn_logits = self.evolution(attn_logits, prev_attn_logits, absent)
        # The softmax needs a mask of its own; attn_logits is handed on without it.
        attn_probs = attn_logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        attn_probs = self.probe(attn_probs, attn_logits)
        return self.out((attn_probs @ v).transpose(1, 2).flatten(2)), attn_logits


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection around it."""

    def __init__(self, dim: int, heads: int, evolution: Optional[AttentionEvolution]) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, heads, evolution)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, padding: Tensor, prev_attn_logits: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        attended, attn_logits = self.attn(self.norm1(x), padding, prev_attn_logits)
        x = x + attended
        return x + self.ffn(self.norm2(x)), attn_logits


class Encoder(nn.Module):
    """Tokens (B, T), padded with PAD on the right -> scores of each token's count, (B, T, MOST)."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, dim, padding_idx=PAD)
        self.layers = nn.ModuleList(
            Layer(dim, heads, AttentionEvolution(heads, alpha=0.1, beta=0.1) if index else None)
            for index in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, MOST))

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PAD
        x, attn_logits = self.words(tokens), None
        for layer in self.layers:
            x, attn_logits = layer(x, padding, attn_logits)
        return self.head(x)


def sentences(count: int) -> List[Tensor]:
    lengths = torch.randint(2, LONGEST + 1, (count,)).tolist()
    return [torch.randint(1, WORDS, (length,)) for length in lengths]


def padded(batch: List[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD)


def counts(tokens: Tensor) -> Tensor:
    """The class of each token: how often it occurs in its sentence, minus 1."""
    return (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum(dim=2).clamp(max=MOST) - 1


def main() -> None:
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, 221):
        tokens = padded(sentences(32))
        exists = tokens != PAD
        loss = F.cross_entropy(model(tokens)[exists], counts(tokens)[exists])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 55 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    batch = sentences(256)
    tokens = padded(batch)
    with torch.no_grad(), collect_maps(model) as maps:
        scores = model(tokens)
    expected = counts(tokens)[tokens != PAD]
    right = (scores.argmax(dim=2)[tokens != PAD] == expected).float().mean().item()
    guessed = (expected == expected.mode().values).float().mean().item()
    print(f"{right:.0%} of the counts are right; always the same guess: {guessed:.0%}")
    for name, _, attn_probs in maps:
        print(f"{name}: {tuple(attn_probs.shape)}")

    with torch.no_grad():
        for sentence, of_batch in zip(batch, scores, strict=True):
            alone = model(sentence.unsqueeze(0))[0]
            torch.testing.assert_close(alone, of_batch[: len(sentence)], atol=1e-4, rtol=1e-4)
    assert right > guessed + 0.1, "the model has not learned its task"
    print("Every sentence gets the same scores alone as in the padded batch.")


if __name__ == "__main__":
    main()
