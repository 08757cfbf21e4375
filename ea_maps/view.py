"""What there is to see of one attention: its maps in one or two models, and what they are over.

In Python or a notebook::

    TokenView({"evolving": maps}, tokens, tokens).figure()  # maps of collect_maps
    ImageView.of({"evolving": look(model, image)}).figure()  # look of ea_maps.image
    as_page([view])  # of ea_maps.page: interactive
"""

import base64
import io
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Dict, List, Optional, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ea_maps import draw
from ea_maps.measure import SUMMARIES, Movement, movement
from evolving_attention import AttentionMap

MOST_LAYERS, MOST_HEADS = 6, 4  # of a picture
CHANNELS = 12  # most channels of a series that the page draws
HEADS = "heads"


def part_of(part: Optional[str], what: str) -> Optional[str]:
    """What is added to the name of a picture that shows `what` of a part."""
    return part if what == HEADS else "-".join(filter(None, [part, what]))


@dataclass
class View:
    """One attention.

    Attributes:
        maps: by the name of the model, layer by layer; of one sentence, image or series.
        attention: its name.
        part: what is added to the name of its picture, if anything.
    """

    kind: ClassVar[str]
    maps: Dict[str, List[AttentionMap]]
    attention: str = field(default="self-attention", kw_only=True)
    part: Optional[str] = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raises ValueError if there is no map, or one is of several inputs or not finite."""
        for name, maps in self.maps.items():
            if not maps:
                raise ValueError(f"{name}: there must be maps, but the list is empty")
            for number, attention in enumerate(maps, 1):
                batch = attention.attn_probs.size(0)
                if batch != 1:
                    raise ValueError(
                        f"{name}: the maps must be of one sentence, image or series, (1, heads, "
                        f"queries, keys), but that of layer {number} is of {batch}; run the model "
                        "on one"
                    )
                if not attention.attn_probs.isfinite().all():
                    raise ValueError(
                        f"{name}: the map of layer {number} must be finite, but holds NaN; "
                        "the model's training may have diverged"
                    )

    def figure(self, layers: int = MOST_LAYERS, heads: int = MOST_HEADS) -> Figure:
        """A picture of at most so many layers and heads, evenly spaced.

        Raises:
            ValueError: these are not whole numbers of 1 or more.
        """
        raise NotImplementedError

    def labels(self) -> Dict[str, Sequence[Any]]:
        """The names of the queries and of the keys."""
        raise NotImplementedError

    def about(self) -> Dict[str, Any]:
        """What the page needs besides, for all models."""
        return {}

    def about_model(self, name: str) -> Dict[str, Any]:
        """What the page needs besides, for one model."""
        return {}

    def movement(self) -> Dict[str, List[Movement]]:
        return {name: movement(maps) for name, maps in self.maps.items()}

    def shown_as(self, what: str) -> "View":
        """The same view of "heads", or of one of SUMMARIES, which all heads have in common."""
        if what == HEADS:
            return self
        maps = {name: SUMMARIES[what](found) for name, found in self.maps.items()}
        attention = f"{self.attention}, {what}"
        return replace(self, attention=attention, part=part_of(self.part, what), maps=maps)


@dataclass
class TokenView(View):
    """Maps over tokens, whose names are `queries` and `keys`."""

    kind = "tokens"
    queries: Sequence[str]
    keys: Sequence[str]

    def __post_init__(self) -> None:
        """Raises ValueError also if the names are not as many as the map has rows and columns."""
        super().__post_init__()
        sizes = len(self.queries), len(self.keys)
        for name, maps in self.maps.items():
            for found in {tuple(attention.attn_probs.shape[-2:]) for attention in maps}:
                if found != sizes:
                    raise ValueError(
                        f"queries and keys must name {found[0]} and {found[1]} tokens, as the maps "
                        f"of {name} have, special ones included; got {sizes[0]} and {sizes[1]}"
                    )

    def figure(self, layers: int = MOST_LAYERS, heads: int = MOST_HEADS) -> Figure:
        return draw.draw_tokens(self.maps, self.queries, self.keys, layers, heads)

    def labels(self) -> Dict[str, Sequence[Any]]:
        return {"queries": list(self.queries), "keys": list(self.keys)}


@dataclass
class ImageView(View):
    """Maps over an image; `looks` by the name of the model."""

    kind = "image"
    looks: Dict[str, draw.Look]

    @classmethod
    def of(cls, looks: Dict[str, draw.Look]) -> "ImageView":
        """The view of what :func:`ea_maps.image.look` found, by the name of the model."""
        return cls({name: look.maps for name, look in looks.items()}, looks)

    def figure(self, layers: int = MOST_LAYERS, heads: int = MOST_HEADS) -> Figure:
        return draw.draw_image(self.maps, self.looks, layers, heads)

    def labels(self) -> Dict[str, Sequence[Any]]:
        name, maps = next(iter(self.maps.items()))
        places = maps[0].attn_probs.size(-1) - self.looks[name].prefix
        tokens = list(range(self.most_special() + places))
        return {"queries": tokens, "keys": tokens}

    def most_special(self) -> int:
        """Tokens before the image, in the model that has most of them."""
        return max(look.prefix for look in self.looks.values())

    def about(self) -> Dict[str, Any]:
        first = next(iter(self.looks.values()))
        names = [f"token {i} before the image" for i in range(1, self.most_special() + 1)]
        if any(look.row is not None for look in self.looks.values()):
            names[0] = "class token"
        return {"special": names, "start": "mean" if first.row is None else first.row}

    def about_model(self, name: str) -> Dict[str, Any]:
        look = self.looks[name]
        height, width = look.image.shape[:2]
        file = io.BytesIO()
        Image.fromarray((255 * look.image).round().astype(np.uint8)).save(file, "png")
        return {
            "image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
            "width": width,
            "height": height,
            "prefix": look.prefix,
            "covers": [look.covers[0] / height, look.covers[1] / width],
            "grids": [look.grids[attention.name] for attention in self.maps[name]],
        }


@dataclass
class SeriesView(View):
    """Maps over the steps of a series, (channels, steps)."""

    kind = "series"
    series: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError also if the series has not as many steps as the maps."""
        super().__post_init__()
        for name, maps in self.maps.items():
            steps = maps[0].attn_probs.size(-1)
            if self.series.ndim != 2 or self.series.shape[1] != steps:
                raise ValueError(
                    f"series must be (channels, {steps}), as the maps of {name} have {steps} "
                    f"steps, got shape {self.series.shape}"
                )

    def figure(self, layers: int = MOST_LAYERS, heads: int = MOST_HEADS) -> Figure:
        return draw.draw_series(self.maps, self.series, layers, heads)

    def labels(self) -> Dict[str, Sequence[Any]]:
        steps = list(range(self.series.shape[1]))
        return {"queries": steps, "keys": steps}

    def about(self) -> Dict[str, Any]:
        shown = self.series[draw.spread(len(self.series), CHANNELS)]
        seen = shown[np.isfinite(shown)]
        low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
        heights = (shown - low) / max(high - low, 1e-9)
        return {
            "series": [
                [round(float(x), 3) if np.isfinite(x) else None for x in channel]
                for channel in heights
            ]
        }
