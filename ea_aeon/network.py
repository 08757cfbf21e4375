"""The EA-DC-Transformer (TPAMI paper): dilated causal convolutions beside evolving attention."""

import math
from numbers import Integral, Real
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evolving_attention import AttentionEvolution, AttentionProbe
from evolving_attention.checks import (
    check_count,
    check_flag,
    check_kernel_size,
    check_unit_interval,
)

Map = Optional[Tensor]
POSITIONS = ("none", "sinusoidal", "learned")
READOUTS = ("segments", "mean", "flatten")


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of each step, (length, width), in `like`'s dtype (Vaswani et al., 2017)."""
    dtype = torch.promote_types(like.dtype, torch.float32)  # half precision cannot count steps
    steps = torch.arange(length, device=like.device, dtype=dtype).unsqueeze(1)
    channels = torch.arange(0, width, 2, device=like.device, dtype=dtype)
    angles = steps * torch.exp(channels * (-math.log(10000.0) / width))
    both = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # sine, cosine, sine, ...
    return both[:, :width].to(like.dtype)


class RelativeLogits(nn.Module):
    """Learned relative-position logits of queries, for series of any length (Shaw et al., 2018).

    Args:
        head_dim: width of a head.
        max_distance: steps that are farther apart share one position.
    """

    def __init__(self, head_dim: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
        nn.init.normal_(self.table, std=head_dim**-0.5)

    def forward(self, q: Tensor) -> Tensor:
        """q (B, H, L, head_dim) -> (B, H, L, L), with distance j - i in row i and column j."""
        length = q.size(2)
        if torch.compiler.is_compiling():  # graphs take any length without branching on it
            steps = torch.arange(length, device=q.device)
            distances = (steps - steps.unsqueeze(1)).clamp(-self.max_distance, self.max_distance)
            places = (distances + self.max_distance).expand(*q.shape[:2], -1, -1)
            return (q @ self.table.t()).gather(3, places)
        near = min(length - 1, self.max_distance)
        table = self.table[self.max_distance - near : self.max_distance + near + 1]
        logits = q @ table.t()
        far = length - 1 - near
        left = logits[..., :1].expand(-1, -1, -1, far)
        right = logits[..., -1:].expand(-1, -1, -1, far + 1)
        logits = torch.cat([left, logits, right], dim=3)  # distances 1 - L to L
        # Row i begins with distance -i, which is i places before distance 0. In the flattened rows,
        # each 2 L long, that is a step of 2 L - 1 from row to row.
        flat = logits.flatten(2).narrow(2, length - 1, length * (2 * length - 1))
        return flat.unflatten(2, (length, -1))[..., :length]


class CausalConv(nn.Module):
    """A weight-normalised dilated convolution over earlier steps (Salimans & Kingma, 2016)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, dilation: int
    ) -> None:
        super().__init__()
        self.dilation = dilation
        conv = nn.Conv1d(in_channels, out_channels, kernel_size)  # for its initial weights
        self.direction, self.bias = conv.weight, conv.bias
        self.gain = nn.Parameter(conv.weight.detach().flatten(1).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, in_channels) -> (B, L, out_channels)."""
        norm = self.direction.flatten(1).norm(dim=1)
        weight = self.direction * (self.gain / norm)[:, None, None]
        reach = self.dilation * (weight.size(2) - 1)
        x = F.pad(x.transpose(1, 2), (reach, 0))
        return F.conv1d(x, weight, self.bias, dilation=self.dilation).transpose(1, 2)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the steps that exist; the output is 0 at all others."""

    def forward(self, x: Tensor, exists: Optional[Tensor]) -> Tensor:
        """x (B, L, C), exists (B, L) bool or None if all do -> (B, L, C)."""
        if exists is not None and not self.training:
            return self(x, None).masked_fill(~exists.unsqueeze(2), 0.0)
        steps = x.flatten(0, 1) if exists is None else x[exists]
        if self.training and len(steps) == 1:  # a single step has no variance
            steps = F.batch_norm(
                steps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:
            steps = super().forward(steps)
        if exists is None:
            return steps.view(x.shape)
        return x.new_zeros(x.shape, dtype=steps.dtype).masked_scatter(exists.unsqueeze(2), steps)


class EvolvingSelfAttention(nn.Module):
    """Self-attention over time with relative positions, whose map evolves from the previous one.

    Args:
        d_model: width of the input.
        width: of values and output; a multiple of `num_heads`.
        key_width: of queries and keys; a multiple of `num_heads`.
        evolution: how the map evolves; None in the first block.
        causal: a step sees only itself and earlier steps.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        key_width: int,
        num_heads: int,
        max_distance: int,
        evolution: Optional[AttentionEvolution],
        causal: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.widths = (key_width, key_width, width)
        self.qkv = nn.Linear(d_model, sum(self.widths))
        self.relative = RelativeLogits(key_width // num_heads, max_distance)
        self.evolution = evolution
        self.probe = AttentionProbe()
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, exists: Optional[Tensor], prev_attn_logits: Map
    ) -> Tuple[Tensor, Tensor]:
        """x (B, L, d_model), exists (B, L), the previous layer's map (B, H, L, L) or None.

        Returns (B, L, width) and the map to hand on.
        """
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, head_dim)
            for part in self.qkv(x).split(self.widths, dim=2)
        )
        q = q * q.size(3) ** -0.5
        hidden = absent = None
        if exists is not None:
            hidden = ~exists[:, None, None, :]
            absent = hidden | ~exists[:, None, :, None]
        if self.causal:
            steps = torch.arange(x.size(1), device=x.device)
            future = steps > steps.unsqueeze(1)
            hidden = future if hidden is None else hidden | future
            absent = future if absent is None else absent | future
        attn_logits = q @ k.transpose(2, 3) + self.relative(q)
        if self.evolution is not None and prev_attn_logits is not None:
            attn_logits = self.evolution(attn_logits, prev_attn_logits, absent)
        scores = attn_logits
        if hidden is not None:
            scores = attn_logits.masked_fill(hidden, float("-inf"))
        probs = self.probe(scores.softmax(dim=-1), attn_logits)
        x = (probs @ v).transpose(1, 2).flatten(2)  # (B, L, width)
        return self.out_proj(x), attn_logits


class AugmentedConv(nn.Module):
    """A causal convolution beside attention, then batch normalisation and a feed-forward network.

    Args:
        conv: computes the first channels.
        attention: computes the other channels; None if the convolution computes all.
    """

    def __init__(
        self,
        conv: CausalConv,
        attention: Optional[EvolvingSelfAttention],
        d_model: int,
        ffn_dim: int,
        dropouts: Tuple[float, float],
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        dropout, map_dropout = dropouts
        self.map_dropout = nn.Dropout(map_dropout)
        self.conv, self.attention = conv, attention
        self.checkpoint_activations = checkpoint_activations
        self.norm = MaskedBatchNorm(d_model)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, ffn_dim),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(ffn_dim, d_model),
        )

    def forward(
        self, x: Tensor, exists: Optional[Tensor], prev_attn_logits: Map
    ) -> Tuple[Tensor, Map]:
        """x (B, L, d_model), exists (B, L) -> the same shape, and the map to hand on."""
        out, attn_logits = self.conv(x), None
        if self.attention is not None:
            if self.checkpoint_activations and self.training:
                attended, attn_logits = checkpoint(
                    self.attention, x, exists, prev_attn_logits, use_reentrant=False
                )
            else:
                attended, attn_logits = self.attention(x, exists, prev_attn_logits)
            out = torch.cat([out, attended], dim=2)
            attn_logits = self.map_dropout(attn_logits)
        return self.ffn(self.norm(out, exists)), attn_logits


class Block(nn.Module):
    """Two augmented convolutions of one dilation with a residual connection around them."""

    def __init__(self, first: AugmentedConv, second: AugmentedConv, d_model: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.norm = MaskedBatchNorm(d_model)

    def forward(
        self, x: Tensor, exists: Optional[Tensor], prev_attn_logits: Map
    ) -> Tuple[Tensor, Map]:
        """x (B, L, d_model), exists (B, L) -> the same shape, and the map to hand on."""
        out, attn_logits = self.first(x, exists, prev_attn_logits)
        out, attn_logits = self.second(out, exists, attn_logits)
        return self.norm(x + out, exists), attn_logits


class DCTransformer(nn.Module):
    """Dilated causal convolutions beside evolving attention, for multivariate time series.

    This is the network of the authors' code without its defects: relative positions are learned,
    the output of attention is projected, padding has no effect, and maps are handed on as the
    papers' equations say. examples/time_series/README.md compares the two part by part.

    Args:
        in_channels: channels of the series.
        out_features: classes, or 1 for a regression.
        max_length: steps of the longest series in training.
        d_model: width.
        ffn_dim: width inside the feed-forward networks.
        num_blocks: number of blocks; block k, counted from 0, has convolutions of dilation 2^k.
            Attention evolves from the second block on.
        num_heads: attention heads.
        attention_dim: channels of `d_model` that attention computes, and convolutions the rest; 0
            means only convolutions.
        key_dim: channels of the queries and keys of all heads; None means `attention_dim`.
        kernel_size: steps that a convolution over time sees.
        max_distance: steps that are farther apart share a relative position.
        positions: what is added to the projected series: "sinusoidal" or "learned" vectors for each
            step, or "none".
        readout: what the last layer sees. "segments": the mean over each of `num_segments` parts of
            the series, all about equally long; "mean": the mean over all steps; "flatten": every
            step, as in the authors' code, so that series may have at most `max_length` steps.
        num_segments: parts of a series; fewer steps than that leave some of them 0.
        dropout: after the positions, in the feed-forward networks and before the read-out.
        map_dropout: of the maps that are handed on; the authors use `dropout`.
        causal: attention sees only earlier steps, too.
        checkpoint_activations: recompute attention in the backward pass, which saves memory.
        alpha, beta, evolution_kernel_size, learnable: as in
            :class:`evolving_attention.AttentionEvolution`; at alpha = beta = 0 no maps are handed
            on.

    Raises:
        ValueError: an argument out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        max_length: int,
        d_model: int = 64,
        ffn_dim: int = 128,
        num_blocks: int = 4,
        num_heads: int = 2,
        attention_dim: int = 16,
        key_dim: Optional[int] = None,
        kernel_size: int = 3,
        max_distance: int = 128,
        positions: str = "sinusoidal",
        readout: str = "segments",
        num_segments: int = 4,
        dropout: float = 0.1,
        map_dropout: float = 0.0,
        causal: bool = False,
        checkpoint_activations: bool = False,
        alpha: float = 0.3,
        beta: float = 0.5,
        evolution_kernel_size: int = 3,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        key_dim = attention_dim if key_dim is None else key_dim
        sizes = {"d_model": d_model, "ffn_dim": ffn_dim, "num_blocks": num_blocks}
        sizes |= {"num_heads": num_heads, "kernel_size": kernel_size, "max_distance": max_distance}
        sizes |= {"max_length": max_length, "num_segments": num_segments}
        for name, value in sizes.items():
            check_count(name, value)
        for name, flag in (("causal", causal), ("checkpoint_activations", checkpoint_activations)):
            check_flag(name, flag)
        divides = isinstance(attention_dim, Integral) and attention_dim % num_heads == 0
        if not divides or not 0 <= attention_dim < d_model:
            raise ValueError(
                f"attention_dim must be less than d_model ({d_model}) and a multiple of num_heads "
                f"({num_heads}), got {attention_dim!r}"
            )
        divides = isinstance(key_dim, Integral) and key_dim % num_heads == 0
        if attention_dim and not (divides and key_dim > 0):
            raise ValueError(
                f"key_dim must be a multiple of num_heads ({num_heads}), got {key_dim!r}"
            )
        for name, value in (("dropout", dropout), ("map_dropout", map_dropout)):
            if not isinstance(value, Real) or not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
        for name, value, known in (
            ("positions", positions, POSITIONS),
            ("readout", readout, READOUTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_unit_interval(name, value)
        check_kernel_size("evolution_kernel_size", evolution_kernel_size)
        evolves = learnable or alpha > 0 or beta > 0
        window = "causal" if causal else "bidirectional"

        def layer(index: int) -> AugmentedConv:
            conv = CausalConv(d_model, d_model - attention_dim, kernel_size, 2**index)
            attention = evolution = None
            if attention_dim and evolves and index > 0:
                evolution = AttentionEvolution(
                    num_heads, alpha, beta, evolution_kernel_size, window, learnable
                )
            if attention_dim:
                attention = EvolvingSelfAttention(
                    d_model, attention_dim, key_dim, num_heads, max_distance, evolution, causal
                )
            dropouts = dropout, map_dropout if evolves else 0.0
            return AugmentedConv(
                conv, attention, d_model, ffn_dim, dropouts, checkpoint_activations
            )

        self.positions, self.readout, self.max_length = positions, readout, int(max_length)
        # Weights without it are of a network with another activation before its read-out.
        self.register_buffer("steps", torch.tensor(self.max_length))
        self.embed = nn.Linear(in_channels, d_model)
        if positions == "learned":
            self.position_table = nn.Parameter(torch.empty(max_length, d_model))
            nn.init.uniform_(self.position_table, -0.02, 0.02)
        self.blocks = nn.ModuleList(
            Block(layer(index), layer(index), d_model) for index in range(num_blocks)
        )
        self.dropout = nn.Dropout(dropout)
        self.num_segments = {"segments": num_segments, "mean": 1, "flatten": max_length}[readout]
        self.head = nn.Linear(d_model * self.num_segments, out_features)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        """Series (B, L, in_channels), padded on the right, and their lengths (B,), 1 or more.

        Returns:
            (B, out_features), class logits or the standardised target.

        Raises:
            ValueError: a length of less than 1 or more than L, or more than `max_length` if the
                network has a weight for each step.
        """
        steps = torch.arange(series.size(1), device=series.device)
        exists: Optional[Tensor] = steps < lengths.unsqueeze(1)
        recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if not recorded and len(lengths):
            shortest, longest = torch.stack(lengths.aminmax()).tolist()
            if shortest < 1 or longest > len(steps):
                raise ValueError(
                    f"lengths must lie in [1, {len(steps)}], got {shortest} to {longest}"
                )
            series = series[:, :longest]
            exists = exists[:, :longest] if shortest < longest else None
        if not self.takes_any_length and series.size(1) > self.max_length:
            raise ValueError(
                f"series have up to {series.size(1)} steps, but the network has weights for "
                f"{self.max_length}, the longest in training; cut the series, or train with "
                "another readout than flatten and other positions than learned"
            )
        x = self.embed(series) * self.embed.out_features**0.5  # (B, L, d_model)
        if self.positions == "sinusoidal":
            x = x + sinusoids(x.size(1), x.size(2), x)
        if self.positions == "learned":
            x = x + self.position_table[: x.size(1)]
        if self.positions != "none":
            x = self.dropout(x)
        attn_logits: Map = None
        for block in self.blocks:
            x, attn_logits = block(x, exists, attn_logits)
        x = self.dropout(F.gelu(x))
        if exists is not None:
            x = x.masked_fill(~exists.unsqueeze(2), 0.0)
        if self.readout == "flatten":
            return self.head(F.pad(x, (0, 0, 0, self.max_length - x.size(1))).flatten(1))
        return self.head(self.segment_means(x, exists, lengths).flatten(1))

    def segment_means(self, x: Tensor, exists: Optional[Tensor], lengths: Tensor) -> Tensor:
        """x (B, L, d_model), 0 at padding -> (B, num_segments, d_model).

        Step t of a series of n steps belongs to segment floor(t * num_segments / n).
        """
        steps = torch.arange(x.size(1), device=x.device) * self.num_segments
        places = steps.div(lengths.unsqueeze(1), rounding_mode="floor")  # (B, L)
        segments = torch.arange(self.num_segments, device=x.device)
        belongs = places.unsqueeze(1) == segments.unsqueeze(1)  # (B, num_segments, L)
        if exists is not None:
            belongs = belongs & exists.unsqueeze(1)
        counts = belongs.sum(dim=2, keepdim=True).clamp(min=1)
        return belongs.to(x.dtype) @ x / counts

    @property
    def takes_any_length(self) -> bool:
        """Whether series may be longer than those of the training."""
        return self.readout != "flatten" and self.positions != "learned"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if f"{prefix}embed.weight" in state_dict and f"{prefix}steps" not in state_dict:
            args[-1].append(
                "these weights were saved by an earlier version, whose network had another "
                "activation before its read-out; train again"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class Ensemble(nn.Module):
    """The mean of networks that differ in their initial weights and in the order of training.

    Args:
        members: the networks.
        averages_probabilities: average the probabilities of classes, and return the logarithm of
            their mean; else average the outputs.
    """

    def __init__(self, members: Sequence[nn.Module], averages_probabilities: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.averages_probabilities = averages_probabilities

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        """Arguments and result as those of :meth:`DCTransformer.forward`."""
        outputs = torch.stack([member(series, lengths) for member in self.members])
        if not self.averages_probabilities:
            return outputs.mean(dim=0)
        return outputs.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(self.members))


def member_of(network: nn.Module, number: int) -> nn.Module:
    """One network of an ensemble; a network alone is number 0.

    Raises:
        ValueError: there is none of this number.
    """
    members = network.members if isinstance(network, Ensemble) else [network]
    if not isinstance(number, Integral) or not 0 <= number < len(members):
        raise ValueError(f"member must lie in [0, {len(members) - 1}], got {number!r}")
    return members[number]
