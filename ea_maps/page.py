"""Writes maps as an interactive page of HTML, which needs nothing else, or as numpy's arrays."""

import base64
import html
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ea_maps.draw import spread
from ea_maps.view import View
from evolving_attention import AttentionMap
from evolving_attention.checks import check_count

TEMPLATE = Path(__file__).with_name("page.html")
LIMIT = 4_000_000  # bytes of all maps in a page, compressed
CELLS = 40_000_000  # of maps to compress at most


def pack(probs: Tensor) -> Tuple[bytes, float]:
    """Probabilities in one byte each, compressed, and the highest one.

    A byte is 255 times the square root of p / highest. The root keeps small probabilities apart.
    """
    most = max(probs.max().item(), 1e-12)
    cells = (255 * (probs.clamp(min=0) / most).sqrt()).round().to(torch.uint8)
    return zlib.compress(cells.contiguous().numpy().tobytes(), 6), most


def shared(probs: Tensor, bin_: int) -> Tensor:
    """(heads, T, S) with `bin_` queries in a row, as their mean, and keys in a column, summed."""
    count = probs.size(1)
    probs = F.pad(probs, (0, -probs.size(2) % bin_, 0, -count % bin_))
    rows = probs.unflatten(1, (-1, bin_)).sum(dim=2)
    members = torch.full((rows.size(1), 1), float(bin_))
    members[-1] = count - bin_ * (rows.size(1) - 1)  # the last row may have fewer
    return (rows / members).unflatten(2, (-1, bin_)).sum(dim=3)


def pack_layer(attention: AttentionMap, heads: Sequence[int], bin_: int) -> Dict[str, Any]:
    probs = attention.attn_probs[0].detach().float().cpu()[list(heads)]
    probs = shared(probs, bin_)
    packed, most = pack(probs)
    data = base64.b64encode(packed).decode()
    return {"name": attention.name, "shape": list(probs.shape), "most": most, "data": data}


def pack_view(view: View, heads: Dict[str, List[int]], limit: int) -> Tuple[Dict[str, Any], int]:
    """The layers of each model, in about `limit` bytes, and how many neighbours share a cell.

    Patches of an image cannot share cells, so there heads are left out instead, from `heads`.
    """
    bin_ = 1
    while True:
        cells = sum(
            len(heads[name]) * maps[0].attn_probs[0, 0].numel() * len(maps)
            for name, maps in view.maps.items()
        )
        excess = cells / bin_**2 / CELLS
        most = max(map(len, heads.values()))
        smallest = view.kind == "image" and most == 1
        if excess <= 1 or smallest:
            layers = {
                name: [pack_layer(attention, heads[name], bin_) for attention in maps]
                for name, maps in view.maps.items()
            }
            excess = sum(len(x["data"]) for found in layers.values() for x in found) / limit
        if excess <= 1 or smallest:
            return layers, bin_
        if view.kind == "image":
            fewer = max(1, min(most - 1, int(most / excess)))
            heads.update({name: pick(numbers, fewer) for name, numbers in heads.items()})
        else:
            bin_ = max(bin_ + 1, int(bin_ * excess**0.5))


def pick(numbers: Sequence[int], limit: int) -> List[int]:
    """At most `limit` of the numbers, evenly spread."""
    return [numbers[i] for i in spread(len(numbers), limit)]


def describe(
    view: View,
    most_layers: Optional[int],
    most_heads: Optional[int],
    limit: int,
) -> Dict[str, Any]:
    """A view as the page reads it."""
    moved = view.movement()
    depths = {name: len(maps) for name, maps in view.maps.items()}
    chosen = {name: spread(depth, most_layers or depth) for name, depth in depths.items()}
    counts = {name: maps[0].attn_probs.size(1) for name, maps in view.maps.items()}
    heads = {name: spread(count, most_heads or count) for name, count in counts.items()}
    maps = {name: [view.maps[name][i] for i in numbers] for name, numbers in chosen.items()}
    view = replace(view, maps=maps)
    packed, bin_ = pack_view(view, heads, limit)
    models = []
    for name, layers in packed.items():
        about = view.about_model(name)
        grids = about.pop("grids", [None] * len(layers))
        measures = {
            measure: [number_of(getattr(moved[name][i], measure)) for i in chosen[name]]
            for measure in ("entropy", "distance", "mean_distance")
        }
        layers = [
            {**layer, "grid": grid, "number": index + 1}
            for layer, grid, index in zip(layers, grids, chosen[name], strict=True)
        ]
        one = {"name": name, "layers": layers, "heads": heads[name], "prefix": 0}
        one["depth"] = depths[name]
        models.append({**one, **measures, **about})
    notes = [f"To keep this file small, {bin_} neighbours share a cell."] if bin_ > 1 else []
    for what, all_, shown in (("layers", depths, chosen), ("heads", counts, heads)):
        if any(len(shown[name]) < count for name, count in all_.items()):
            notes.append(f"Not all {what} are in this file, but some that are evenly spaced.")
    return {
        "attention": view.attention,
        "kind": view.kind,
        "note": " ".join(notes),
        "bin": bin_,
        "models": models,
        **view.labels(),
        **view.about(),
    }


def number_of(measured: Optional[Tensor]) -> Optional[float]:
    """The mean over the heads."""
    return None if measured is None else round(float(measured.mean()), 4)


class Page(str):
    """The text of a page, which a notebook shows in a frame as the last line of a cell."""

    def _repr_html_(self) -> str:
        frame = 'width="100%" height="900" style="border: 0"'
        return f'<iframe {frame} srcdoc="{html.escape(self)}"></iframe>'


def as_page(
    views: Sequence[View],
    title: str = "Attention maps",
    most_layers: Optional[int] = None,
    most_heads: Optional[int] = None,
) -> Page:
    """The page.

    Args:
        title: the heading.
        most_layers, most_heads: to hold at most; None means all that fit.

    Raises:
        ValueError: there is no view, or `most_layers` or `most_heads` is not a whole number of 1 or
            more.
    """
    for name, most in (("most_layers", most_layers), ("most_heads", most_heads)):
        if most is not None:
            check_count(name, most)
    if not views:
        raise ValueError("views must hold at least one view, got none")
    limit = LIMIT // len(views)
    found = [describe(view, most_layers, most_heads, limit) for view in views]
    text = json.dumps({"title": title, "views": found}, ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c")  # nothing may end the script element
    head, script = TEMPLATE.read_text(encoding="utf-8").split("/*DATA*/")
    head = head.replace("<title></title>", f"<title>{html.escape(title)}</title>", 1)
    return Page(head + text + script)


def arrays(views: Sequence[View]) -> Dict[str, np.ndarray]:
    """The maps as arrays, for other programs.

    `MODEL/ATTENTION/NUMBER` holds the probabilities of a layer, (1, heads, queries, keys), and
    `ATTENTION/queries` and `ATTENTION/keys` the names of the tokens.
    """
    found = {}
    for view in views:
        for side, names in view.labels().items():
            found[f"{view.attention}/{side}"] = np.array(names)
        for model, maps in view.maps.items():
            for number, attention in enumerate(maps):
                key = f"{model}/{view.attention}/{number:03d}"
                found[key] = attention.attn_probs.detach().float().cpu().numpy()
    return found
