"""Attention over the pixels of a feature map, beside a convolution (attention augmentation).

Follows the authors' TensorFlow code (EAResnet50), except in two details of its down-sampling: the
3x3 average pooling is centred on the same pixels as the stride-2 convolution beside it, and the
bilinear resizing back is PyTorch's usual one (half-pixel centres).
"""

from typing import Dict, Optional, Tuple

import torch
from timm.layers import lecun_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from ea_timm.evolved import Evolved, map_before
from evolving_attention import AttentionEvolution, AttentionProbe
from evolving_attention.checks import check_count


class RelativeLogits2d(nn.Module):
    """Relative-position logits, from a learned table for rows and one for columns.

    Args:
        map_size: (height, width) of the tables, which are resized for other sizes.
        head_dim: channels of a query of one head.

    Attributes:
        r_height, r_width: (2 * height - 1, head_dim) and (2 * width - 1, head_dim); the row in
            the middle is that of distance 0, the first one of the key farthest above or left.
        keeps_size: whether a file's tables are resized to the size of the model's; otherwise the
            model's take the size of those in the file.
    """

    keeps_size = True

    def __init__(
        self,
        map_size: Tuple[int, int],
        head_dim: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if min(map_size) < 1:
            raise ValueError(f"map_size must be 1 or more each way, got {tuple(map_size)}")
        factory = {"device": device, "dtype": dtype}
        self.r_height = nn.Parameter(torch.empty(2 * map_size[0] - 1, head_dim, **factory))
        self.r_width = nn.Parameter(torch.empty(2 * map_size[1] - 1, head_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the tables with the standard deviation of the official code."""
        for table in (self.r_height, self.r_width):
            nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, q: Tensor) -> Tensor:
        """(batch, heads, H * W, H * W) for queries (batch, heads, H, W, head_dim)."""
        H, W = q.shape[2:4]
        of_rows = torch.einsum("bnhwd,hkd->bnhwk", q, by_distance(self.r_height, H))
        of_columns = torch.einsum("bnhwd,wkd->bnhwk", q, by_distance(self.r_width, W))
        of_rows = of_rows.flatten(2, 3).unsqueeze(4)  # (B, heads, H * W, H, 1)
        of_columns = of_columns.flatten(2, 3).unsqueeze(3)  # (B, heads, H * W, 1, W)
        return (of_rows + of_columns).flatten(3)

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        """Loads tables of another size, too."""
        for name, table in (("r_height", self.r_height), ("r_width", self.r_width)):
            given = state_dict.get(f"{prefix}{name}")
            if given is not None and given.shape[1:] == table.shape[1:]:
                if self.keeps_size:
                    state_dict[f"{prefix}{name}"] = resize_table(given, table.shape[0])
                else:  # the parameter stays the same object: an optimiser may hold it already
                    table.data = table.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.fx.wrap
@register_notrace_function
def by_distance(table: Tensor, size: int) -> Tensor:
    """The row of the table for each query and key along one axis: (size, size, head_dim)."""
    position = torch.arange(size, device=table.device)
    distance = position.unsqueeze(0) - position.unsqueeze(1)
    return resize_table(table, 2 * size - 1)[distance + size - 1]


def resize_table(table: Tensor, length: int) -> Tensor:
    """Resizes a table to (length, head_dim); distance 0 stays in the middle."""
    # In a graph for images of any size, `length` is no int and must not be compared.
    if isinstance(length, int) and table.shape[0] == length:
        return table
    if isinstance(length, int) and length == 1:  # interpolate would return the first row
        return table[table.shape[0] // 2 :][:1]
    table = table.t().unsqueeze(0)
    table = F.interpolate(table, size=length, mode="linear", align_corners=True)
    return table.squeeze(0).t().contiguous()


class EvolvingAttention2d(nn.Module):
    """Self-attention over pixels, whose map evolves from that of the previous block.

    Args:
        in_channels: of the feature map.
        key_channels: of the queries of all heads, and of their keys; a multiple of `num_heads`.
        value_channels: of the values of all heads and of the output; a multiple of `num_heads`.
        num_heads: heads.
        map_size: (height, width) of the map that attention sees, for the tables of positions.
        stride: 2 pools the input before attention, to the size that a stride-2 convolution returns.
        downsample: pool once more, and resize the output back.
        attn_drop: dropout of the attention probabilities.
        evolution: how the map evolves; None if there is no previous map.

    Raises:
        ValueError: `num_heads` does not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        num_heads: int,
        map_size: Tuple[int, int],
        stride: int = 1,
        downsample: bool = False,
        attn_drop: float = 0.0,
        evolution: Optional[AttentionEvolution] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        check_count("num_heads", num_heads)
        for name, channels in (("key", key_channels), ("value", value_channels)):
            if channels < 1 or channels % num_heads:
                raise ValueError(
                    f"num_heads must divide the attention's {name} channels ({channels} for "
                    f"{in_channels} input channels), got num_heads={num_heads}"
                )
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.key_channels = key_channels
        self.value_channels = value_channels
        self.scale = (key_channels // num_heads) ** -0.5
        self.stride = stride
        self.downsample = downsample
        self.kqv = nn.Conv2d(in_channels, 2 * key_channels + value_channels, 1, **factory)
        self.position = RelativeLogits2d(map_size, key_channels // num_heads, **factory)
        self.evolution = evolution
        self.probe = AttentionProbe()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Conv2d(value_channels, value_channels, 1, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all weights as the official code does, and biases with 0."""
        self.position.reset_parameters()
        convolutions = [self.kqv, self.proj]
        if self.evolution is not None:
            self.evolution.reset_parameters()
            if self.evolution.weight is not None:
                convolutions.append(self.evolution)
        for convolution in convolutions:
            lecun_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, x: Tensor, prev_attn_logits: Optional[Tensor] = None) -> Evolved:
        """The output and the map to hand on.

        Args:
            x: (batch, in_channels, height, width).
            prev_attn_logits: the map of the previous block, (batch, heads, H * W, H * W) for a
                pooled height H and width W. Without `evolution` it is not read and may be None.

        Returns:
            (batch, value_channels, height / stride, width / stride), and the map.

        Raises:
            ValueError: `prev_attn_logits` has another number of pixels, or is missing.
        """
        if self.stride == 2:
            x = pool(x)
        height, width = x.shape[-2:]
        if self.downsample:
            x = pool(x)
        B, _, H, W = x.shape
        kqv = self.kqv(x)
        k, q, v = kqv.split([self.key_channels, self.key_channels, self.value_channels], dim=1)
        heads = self.num_heads
        k = k.reshape(B, heads, self.key_channels // heads, H * W)
        q = q.reshape(B, heads, self.key_channels // heads, H, W).permute(0, 1, 3, 4, 2)
        q = q * self.scale
        v = v.reshape(B, heads, self.value_channels // heads, H * W)

        attn_logits = q.flatten(2, 3) @ k + self.position(q)  # (B, heads, H * W, H * W)
        if self.evolution is not None:
            attn_logits = self.evolution(attn_logits, map_before(prev_attn_logits))
        attn_probs = self.probe(attn_logits.softmax(dim=-1), attn_logits)
        attn_probs = self.attn_drop(attn_probs)
        x = v @ attn_probs.transpose(2, 3)  # (B, heads, channels, H * W)

        x = self.proj(x.reshape(B, self.value_channels, H, W))
        if self.downsample:
            x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        return Evolved(x, attn_logits)


def pool(x: Tensor) -> Tensor:
    """Halves height and width (rounded up), as a padded 3x3 convolution of stride 2 does."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)


class AugmentedConv2d(nn.Module):
    """A convolution in which attention computes some of the output channels.

    Of the plain convolution's C output channels the last C / 8, or another share, are attention's,
    with C / 4 channels of keys and queries.

    Args:
        conv: the plain convolution to replace; only its shape matters, not its weights.
        share: attention computes one of `share` output channels.
        other arguments: as in :class:`EvolvingAttention2d`.

    Raises:
        ValueError: the channels are not divisible, or the convolution changes the size.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        num_heads: int,
        map_size: Tuple[int, int],
        share: int = 8,
        downsample: bool = False,
        attn_drop: float = 0.0,
        evolution: Optional[AttentionEvolution] = None,
    ) -> None:
        super().__init__()
        channels = conv.out_channels
        if channels % share or (channels - channels // share) % conv.groups:
            raise ValueError(
                f"an augmented convolution needs output channels that {share} divides, "
                f"{share - 1}/{share} of which its groups divide, got {channels} channels in "
                f"{conv.groups} groups"
            )
        centred = tuple(
            d * (k - 1) / 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        )
        if conv.padding not in ("same", centred) or conv.stride[0] != conv.stride[1]:
            raise ValueError(
                "an augmented convolution must be padded to the size of its input, and its stride "
                f"the same both ways, got padding {conv.padding} and stride {conv.stride}"
            )
        factory = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.conv = nn.Conv2d(
            conv.in_channels,
            channels - channels // share,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            **factory,
        )
        self.attn = EvolvingAttention2d(
            conv.in_channels,
            channels // 4,
            channels // share,
            num_heads,
            map_size,
            stride=conv.stride[0],
            downsample=downsample,
            attn_drop=attn_drop,
            evolution=evolution,
            **factory,
        )
        # timm's ResNet initialises every convolution like this.
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        """Also loads a plain convolution's weights, of which it takes the first channels.

        Raises:
            ValueError: the convolution has groups, whose first channels are not such a part.
        """
        weight, channels = state_dict.get(f"{prefix}weight"), self.conv.out_channels
        if weight is not None and weight.shape[0] == channels + self.attn.value_channels:
            if self.conv.groups > 1:
                raise ValueError(
                    f"{prefix.rstrip('.')} has {self.conv.groups} groups (cardinality of the "
                    "model), and a plain convolution with groups has no part for it: load the "
                    "weights of an augmented network, or make one with cardinality=1"
                )
            del state_dict[f"{prefix}weight"]
            state_dict[f"{prefix}conv.weight"] = weight[:channels]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, prev_attn_logits: Optional[Tensor] = None) -> Evolved:
        """Features (batch, channels, height, width) and map; see :class:`EvolvingAttention2d`."""
        convolved = self.conv(x)
        attended, attn_logits = self.attn(x, prev_attn_logits)
        return Evolved(torch.cat([convolved, attended], dim=1), attn_logits)
