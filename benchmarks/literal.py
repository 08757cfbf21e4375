"""Evolving attention as the paper prints it, one plain operation after the other.

The two equations are written straightforwardly in PyTorch, as in the authors' own PyTorch code:
every intermediate is a map of its own, which is kept for the backward pass.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn
from torch.nn import functional as F

from evolving_attention import AttentionEvolution


class LiteralEvolution(AttentionEvolution):
    """The same weights and the same map, computed literally."""

    def forward(
        self,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        mask: Tensor | None = None,
        window: str | None = None,
    ) -> Tensor:
        alpha, beta = self.mixing_weights()
        a_in = alpha * prev_attn_logits + (1 - alpha) * attn_logits
        if mask is not None:
            a_in = a_in.masked_fill(mask, 0)
        if self.weight is None:
            return a_in
        window, reach = window or self.window, self.kernel_size - 1
        if window == "bidirectional":
            refined = F.conv2d(a_in, self.weight, self.bias, padding=reach // 2)
        else:
            sides = (reach, 0) if window == "causal" else (reach // 2, reach // 2)
            refined = F.conv2d(F.pad(a_in, (*sides, reach, 0)), self.weight, self.bias)
        refined = F.relu(refined)
        return beta * refined + (1 - beta) * a_in


def make_literal(model: nn.Module) -> nn.Module:
    """A copy of the model with the same weights, in which every evolution is literal."""
    model = deepcopy(model)
    for module in model.modules():
        if type(module) is AttentionEvolution:
            module.__class__ = LiteralEvolution  # keeps weights, options and name in the model
    return model
