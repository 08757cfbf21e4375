"""What passes between the blocks of a network whose attention maps evolve."""

from typing import Any, NamedTuple, Optional

from timm.models import checkpoint
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class Evolved(NamedTuple):
    """What every block returns: ``x, attn_logits = block(x, attn_logits)``.

    A hook that expects timm's output can use it like the features: ``output.detach()``,
    ``output[:, 0]``, ``output[:4]`` and the like work. ``output[0]`` is all of the features and
    ``len(output)`` 2, as in any tuple of two.

    Attributes:
        features: what timm's block returns.
        attn_logits: the map to hand on, (batch, heads, tokens, tokens); None if no attention has
            been passed.
    """

    features: Tensor
    attn_logits: Optional[Tensor]

    def __getattr__(self, name: str) -> Any:
        """Attributes and methods of the features, except special methods."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.features, name)

    def __getitem__(self, index: Any) -> Any:
        """A member of the tuple for an int, and for any other index a part of the features."""
        return tuple.__getitem__(self, index) if type(index) is int else self.features[index]


class HandsMapOn:
    """Marks the blocks that take a map and return an :class:`Evolved`."""


def run_block(
    block: nn.Module, checkpointing: bool, x: Tensor, attn_logits: Optional[Tensor], *args: Any
) -> Evolved:
    """``block(x, attn_logits, *args)``, recomputed in the backward pass with `checkpointing`.

    Raises:
        TypeError: the block takes no map, or hands none on.
    """
    takes_a_map = isinstance(block, HandsMapOn) or not isinstance(
        block, (Block, BasicBlock, Bottleneck)
    )
    if takes_a_map:
        if checkpointing:
            evolved = checkpoint(block, x, attn_logits, *args)
        else:
            evolved = block(x, attn_logits, *args)
        if not isinstance(evolved, Tensor):  # unpacking a tensor would split its batch
            return evolved
    raise TypeError(
        f"{type(block).__name__} in the place of a block takes no attention map or returns none. A "
        "block that replaces another must be a subclass of it, or wrap it, and return what it "
        "returns: features and map. See docs/timm.md"
    )


def check_features(x: Tensor) -> None:
    """Raises TypeError if a block or stage got the pair that the previous one returned."""
    if isinstance(x, tuple):
        raise TypeError(
            "got features and attention map as one argument: call "
            "`x, attn_logits = block(x, attn_logits)`, or all blocks together, "
            "`model.blocks(x)` of a ViT, `model.layer3(x)` of a ResNet. See docs/timm.md"
        )


def map_before(prev_attn_logits: Optional[Tensor]) -> Tensor:
    """The map of the previous layer; ValueError if it was lost on the way."""
    if prev_attn_logits is None:
        raise ValueError(
            "this attention evolves the map of the previous layer, which did not come with the "
            "features: call `x, attn_logits = block(x, attn_logits)`, or the model as a whole "
            "(features_only=True, forward_intermediates), or set `evolution = None` in this "
            "attention to make it plain. See docs/timm.md"
        )
    return prev_attn_logits
