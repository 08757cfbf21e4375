"""Maps on paper: layers from top to bottom, heads from left to right, models side by side."""

from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ea_maps.measure import Movement
from evolving_attention import AttentionMap

FORMATS = ("png", "svg", "pdf")
LABELS = 24  # that fit beside a map without touching
LETTERS = 14  # of a label
COLORS = "Blues"  # one hue from light to dark: safe for the colour-blind, and in print
CELL = 1.9  # inches a map

Models = Dict[str, Sequence[AttentionMap]]
Cell = Callable[[Axes, AttentionMap, int], None]


def spread(count: int, limit: int) -> List[int]:
    """At most `limit` of `count` indices, evenly spread from the first to the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(float(x)) for x in np.linspace(0, count - 1, limit)})


def draw(models: Models, cell: Cell, layers: int, heads: int, size: float = CELL) -> Figure:
    """A figure whose cells `cell(axes, map, head)` fills in; only outer axes keep their labels.

    Args:
        models: what each model's attentions did, layer by layer; the names are the headings.
        layers, heads: how many of them to draw at most.
        size: inches of a cell.
    """
    chosen = {
        name: (spread(len(maps), layers), spread(maps[0].attn_probs.size(1), heads))
        for name, maps in models.items()
    }
    rows = [len(layer_numbers) for layer_numbers, _ in chosen.values()]
    columns = [len(head_numbers) for _, head_numbers in chosen.values()]
    figure = Figure(
        figsize=(size * sum(columns) + 1.2, size * max(rows) + 1.2), layout="compressed"
    )
    parts = figure.subfigures(1, len(chosen), width_ratios=columns, squeeze=False)[0]
    for part, (name, (layer_numbers, head_numbers)) in zip(parts, chosen.items(), strict=True):
        if len(chosen) > 1:
            part.suptitle(name, fontweight="bold", fontsize=10)
        axes = part.subplots(len(layer_numbers), len(head_numbers), squeeze=False)
        for axes_of_layer, layer in zip(axes, layer_numbers, strict=True):
            for axis, head in zip(axes_of_layer, head_numbers, strict=True):
                cell(axis, models[name][layer], head)
                axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8, pad=3)
                axis.tick_params(labelsize=7, length=2)
                axis.label_outer()
    return figure


def label(axis, names: Sequence[str]) -> None:
    """Writes the names along a map's x or y axis, every n-th if there are many."""
    step = -(-len(names) // LABELS)
    short = [x if len(x) <= LETTERS else x[: LETTERS - 1] + "…" for x in names]
    axis.set_ticks(range(0, len(names), step), short[::step])


def draw_tokens(
    models: Models, queries: Sequence[str], keys: Sequence[str], layers: int, heads: int
) -> Figure:
    """Probabilities between tokens: a row a query, a column a key."""
    size = CELL + 0.03 * max(0, len(keys) - 12)

    def cell(axes: Axes, attention: AttentionMap, head: int) -> None:
        probs = attention.attn_probs[0, head].float().cpu()
        axes.imshow(probs, cmap=COLORS, vmin=0, vmax=1, interpolation="nearest")
        label(axes.xaxis, keys)
        label(axes.yaxis, queries)
        axes.tick_params(axis="x", labelrotation=90)

    figure = draw(models, cell, layers, heads, size)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return add_scale(figure, "probability", vmax=1.0)


def add_scale(figure: Figure, text: str, vmax: float, cmap: str = COLORS) -> Figure:
    """The colour scale, from 0, at the right."""
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, vmax), cmap)
    axes = figure.add_axes((1.01, 0.35, 0.008, 0.3))
    axes.set_in_layout(False)
    bar = figure.colorbar(scale, cax=axes)
    bar.set_label(text, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_image(
    models: Models,
    image: np.ndarray,
    heat_of: Callable[[AttentionMap, int], Tensor],
    layers: int,
    heads: int,
) -> Figure:
    """Where an image is looked at, over the image in grey.

    Args:
        image: (height, width, channels), from 0 to 1.
        heat_of: the probabilities of a head over the image, (rows, columns).
    """
    height, width = image.shape[:2]
    grey = image.mean(axis=2)
    grey = (grey - grey.min()) / max(grey.max() - grey.min(), 1e-6)

    def cell(axes: Axes, attention: AttentionMap, head: int) -> None:
        heat = heat_of(attention, head).float().cpu()
        box = (0, width, height, 0)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=box)
        # The less a place is looked at, the more of the image is seen.
        shown = 0.9 * (heat / heat.max()).sqrt().numpy()
        axes.imshow(heat, cmap="plasma", vmin=0, alpha=shown, extent=box, interpolation="bilinear")
        axes.set_xticks([])
        axes.set_yticks([])

    return draw(models, cell, layers, heads, size=1.4)


def draw_series(models: Models, series: np.ndarray, layers: int, heads: int) -> Figure:
    """Probabilities between the steps of a series, (channels, steps), which runs above each map."""

    def cell(axes: Axes, attention: AttentionMap, head: int) -> None:
        probs = attention.attn_probs[0, head].float().cpu()
        axes.imshow(probs, cmap=COLORS, vmin=0, interpolation="nearest", aspect="auto")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
        above = axes.inset_axes((0, 1.0, 1, 0.3))
        above.set_prop_cycle(
            color=matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(series)))
        )
        above.plot(series.T, linewidth=0.6)
        above.set_xlim(-0.5, series.shape[1] - 0.5)
        above.axis("off")

    figure = draw(models, cell, layers, heads)
    for axes in figure.findobj(Axes):
        if axes.get_title():
            axes.title.set_y(1.3)  # above the series
    figure.supxlabel("key (step); each map by its own maximum", fontsize=9)
    figure.supylabel("query (step)", fontsize=9)
    return figure


def draw_movement(movements: Dict[str, Dict[str, List[Movement]]]) -> Figure:
    """Entropy and distance layer by layer: a row an attention, a line a model.

    Args:
        movements: for each attention, for each model, its layers.
    """
    figure = Figure(figsize=(6.4, 2.2 * len(movements) + 0.3), layout="constrained")
    axes = figure.subplots(len(movements), 2, squeeze=False)
    for row, (attention, models) in zip(axes, movements.items(), strict=True):
        for color, (name, layers) in enumerate(models.items()):
            style = {"color": f"C{color}", "marker": "os^D"[color % 4]}
            numbers = range(1, len(layers) + 1)
            row[0].plot(numbers, [float(x.entropy.mean()) for x in layers], label=name, **style)
            moved = [(i, x) for i, x in zip(numbers, layers, strict=True) if x.distance is not None]
            numbers = [i for i, _ in moved]
            row[1].plot(numbers, [float(x.distance.mean()) for _, x in moved], **style)
            row[1].plot(numbers, [float(x.mean_distance) for _, x in moved], "--", **style)
        row[0].set_title(f"{attention}: entropy (bits)", fontsize=8)
        row[1].set_title(f"{attention}: distance from layer before", fontsize=8)
        for axis in row:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.set_xlim(0.7, len(layers) + 0.3)
            axis.tick_params(labelsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel("layer", fontsize=8)
    axes[0, 0].legend(fontsize=8)
    lines = [Line2D([], [], color="grey", linestyle=x) for x in ("-", "--")]
    axes[0, 1].legend(lines, ["head by head", "mean of heads"], fontsize=8)
    return figure


def save(figure: Figure, path: Path, part: Optional[str] = None) -> Path:
    """Writes the figure as its suffix says, with `part` added to the name if given."""
    if part is not None:
        path = path.with_name(f"{path.stem}-{part}{path.suffix}")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def check_path(path: Path) -> Tuple[Path, str]:
    """The path and its format. Raises ValueError unless a picture can be written there."""
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise ValueError(f"--out must end in .{', .'.join(FORMATS)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: there is no folder {path.parent}")
    return path, suffix
