"""Draws maps: layers from top to bottom, heads from left to right, models side by side."""

import functools
import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import matplotlib.font_manager
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ea_maps.measure import Movement
from evolving_attention import AttentionMap
from evolving_attention.checks import check_count
from evolving_attention.commands import check_output, whole_or_not_at_all

FORMATS = ("png", "svg", "pdf", "html", "npz")
LABELS = 24  # most labels along a map
LETTERS = 14  # most letters of a label
ROOM = 0.12  # inches per label
COLORS = "Blues"  # one hue from light to dark, for colour-blind readers and for print
MAP = dict(cmap=COLORS, vmin=0, interpolation="nearest", aspect="auto", origin="upper")
CELL = 1.9  # inches per map, or more if its labels need more
# For each letter, the first installed font that has it is used, after those of matplotlibrc.
FONTS = (
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP"),
    *("Noto Sans KR", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei", "Microsoft YaHei"),
    *("PingFang SC", "Hiragino Sans", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo"),
    *("NanumGothic", "UnDotum", "Noto Sans Thai", "Loma", "Leelawadee UI", "Thonburi"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali"),
    *("Noto Sans Tamil", "Noto Sans Telugu", "Noto Sans Georgian", "Noto Sans Armenian"),
    *("Noto Sans Khmer", "Noto Sans Lao", "Noto Sans Myanmar", "Noto Sans Ethiopic", "Nirmala UI"),
    *("Unifont", "Arial Unicode MS", "Noto Emoji", "Symbola", "Segoe UI Emoji"),
)

Models = Dict[str, Sequence[AttentionMap]]
Figures = Dict[Optional[str], Figure]  # by the ending of the file's name
Cell = Callable[[Axes, str, AttentionMap, int], None]


class Picture(Figure):
    """A figure that a notebook shows as the last line of a cell, also without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", bbox_inches="tight")
        return file.getvalue()


class Look(NamedTuple):
    """How a model looks at an image.

    Attributes:
        image: after resizing and cropping, (height, width, channels), 0 to 1.
        maps: of one forward pass.
        grids: rows and columns of places in the image, by the name of the attention.
        prefix: number of tokens before these places, such as the class token.
        row: the token whose attention is shown, or None for the mean over all places.
        covers: height and width of the image that the places cover, in pixels.
    """

    image: np.ndarray
    maps: List[AttentionMap]
    grids: Dict[str, Tuple[int, int]]
    prefix: int
    row: Optional[int]
    covers: Tuple[int, int]

    @property
    def whose(self) -> str:
        """Describes the attention that is shown."""
        whole = "mean attention of the whole image"
        return whole if self.row is None else "attention of the class token"

    def heat_of(self, attention: AttentionMap, head: int) -> Tensor:
        """The probabilities of one head over the image, (rows, columns)."""
        probs = attention.attn_probs[0, head].detach()
        probs = probs[self.prefix :].mean(dim=0) if self.row is None else probs[self.row]
        return probs[self.prefix :].unflatten(0, self.grids[attention.name])


def spread(count: int, limit: int) -> List[int]:
    """At most `limit` of `count` indices, evenly spread from the first to the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(float(x)) for x in np.linspace(0, count - 1, limit)})


def fonts() -> List[str]:
    """The families of matplotlibrc, then the installed fonts of FONTS for the letters they lack."""
    installed = set(matplotlib.font_manager.get_font_names())
    first = matplotlib.rcParams["font.family"]
    return [*first, *(name for name in FONTS if name in installed and name not in first)]


def in_all_fonts(drawing: Callable[..., Figure]) -> Callable[..., Figure]:
    """Lets a function write in all of :func:`fonts`."""

    @functools.wraps(drawing)
    def drawing_in_all_fonts(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context({"font.family": fonts()}):
            return drawing(*args, **kwargs)

    return drawing_in_all_fonts


@in_all_fonts
def draw(
    models: Models,
    cell: Cell,
    layers: int,
    heads: int,
    size: Tuple[float, float] = (CELL, CELL),
    captions: Optional[Dict[str, str]] = None,
) -> Figure:
    """A figure whose cells `cell(axes, model, map, head)` fills; only outer axes have labels.

    Args:
        models: the maps of each model, layer by layer; the names are the headings.
        layers, heads: the largest numbers of layers and heads to draw.
        size: width and height of a cell in inches.
        captions: text below each model's maps.

    Raises:
        ValueError: `layers` or `heads` is not a whole number of 1 or more.
    """
    check_count("layers", layers)
    check_count("heads", heads)
    chosen = {
        name: (spread(len(maps), layers), spread(maps[0].attn_probs.size(1), heads))
        for name, maps in models.items()
    }
    rows = [len(layer_numbers) for layer_numbers, _ in chosen.values()]
    columns = [len(head_numbers) for _, head_numbers in chosen.values()]
    inches = (size[0] * sum(columns) + 1.2, size[1] * max(rows) + 1.2)
    figure = Picture(figsize=inches, layout="compressed")
    parts = figure.subfigures(1, len(chosen), width_ratios=columns, squeeze=False)[0]
    for part, (name, (layer_numbers, head_numbers)) in zip(parts, chosen.items(), strict=True):
        if len(chosen) > 1:
            part.suptitle(name, fontweight="bold", fontsize=10, parse_math=False, usetex=False)
        if captions:
            part.supxlabel(captions[name], fontsize=8)
        axes = part.subplots(len(layer_numbers), len(head_numbers), squeeze=False)
        for axes_of_layer, layer in zip(axes, layer_numbers, strict=True):
            for axis, head in zip(axes_of_layer, head_numbers, strict=True):
                cell(axis, name, models[name][layer], head)
                axis.set_title(title(models[name][layer], layer, head), fontsize=8, pad=3)
                axis.grid(False)
                axis.tick_params(labelsize=7, length=2)
                axis.label_outer()
    return figure


def title(attention: AttentionMap, layer: int, head: int) -> str:
    """Layer and head, counted from 1; the head only if there are several."""
    heads = attention.attn_probs.size(1)
    return f"layer {layer + 1}" + (f", head {head + 1}" if heads > 1 else "")


def label(axis: Axis, names: Sequence[object]) -> None:
    """Writes names along the x or y axis of a map; if there are many, only every n-th one.

    Names may hold anything, so they are written as they are, whatever `text.usetex` says.
    """
    step = -(-len(names) // LABELS)
    short = [x if len(x) <= LETTERS else x[: LETTERS - 1] + "…" for x in map(str, names)]
    axis.set_ticks(range(0, len(names), step), short[::step], parse_math=False, usetex=False)


def draw_tokens(
    models: Models, queries: Sequence[str], keys: Sequence[str], layers: int, heads: int
) -> Figure:
    """Probabilities between tokens: a row for each query, a column for each key."""
    width, height = (max(CELL, ROOM * min(len(names), LABELS)) for names in (keys, queries))

    def cell(axes: Axes, model: str, attention: AttentionMap, head: int) -> None:
        probs = attention.attn_probs[0, head].detach().float().cpu()
        axes.imshow(probs, vmax=1, **MAP)
        label(axes.xaxis, keys)
        label(axes.yaxis, queries)
        axes.tick_params(axis="x", labelrotation=90)

    figure = draw(models, cell, layers, heads, (width, height))
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return add_scale(figure)


def add_scale(figure: Figure) -> Figure:
    """Adds the colour scale of probabilities on the right."""
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLORS)
    axes = figure.add_axes((1.01, 0.35, 0.008, 0.3))
    axes.set_in_layout(False)
    bar = figure.colorbar(scale, cax=axes)
    bar.set_label("probability", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_image(models: Models, looks: Dict[str, Look], layers: int, heads: int) -> Figure:
    """The attention of each model over its input image in grey."""
    captions = {name: f"{look.whose},\neach map by its own maximum" for name, look in looks.items()}

    def cell(axes: Axes, model: str, attention: AttentionMap, head: int) -> None:
        draw_over_image(axes, looks[model], attention, head)

    return draw(models, cell, layers, heads, (1.4, 1.4), captions)


def draw_over_image(axes: Axes, look: Look, attention: AttentionMap, head: int) -> None:
    """One head's attention over the image in grey."""
    grey = stretch(look.image.mean(axis=2))
    height, width = grey.shape
    heat = look.heat_of(attention, head).float().cpu()
    below, right = look.covers
    upright = {"origin": "upper", "aspect": "equal"}
    below_image = {"extent": (0, width, height, 0), **upright}
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, **below_image)
    # Places with little attention show more of the image.
    shown = 0.9 * (heat / heat.max()).sqrt().numpy()
    box = {"extent": (0, right, below, 0), "interpolation": "bilinear", **upright}
    axes.imshow(heat, cmap="plasma", vmin=0, alpha=shown, **box)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])


def stretch(grey: np.ndarray) -> np.ndarray:
    """Stretches brightness to [0, 1]."""
    return (grey - grey.min()) / max(grey.max() - grey.min(), 1e-6)


def draw_series(models: Models, series: np.ndarray, layers: int, heads: int) -> Figure:
    """Probabilities between the steps of a series, (channels, steps), drawn above each map."""

    def cell(axes: Axes, model: str, attention: AttentionMap, head: int) -> None:
        probs = attention.attn_probs[0, head].detach().float().cpu()
        axes.imshow(probs, **MAP)
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


@in_all_fonts
def draw_movement(movements: Dict[str, Dict[str, List[Movement]]]) -> Figure:
    """Entropy and distance by layer: a row for each attention, a line for each model.

    Args:
        movements: the layers, by attention and by model.
    """
    figure = Picture(figsize=(6.4, 2.2 * len(movements) + 0.3), layout="constrained")
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
        row[1].set_title(f"{attention}: distance from previous layer", fontsize=8)
        for axis in row:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.set_xlim(0.7, max(map(len, models.values())) + 0.3)
            axis.tick_params(labelsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel("layer", fontsize=8)
    for text in axes[0, 0].legend(fontsize=8).get_texts():
        text.set_parse_math(False)
        text.set_usetex(False)
    lines = [Line2D([], [], color="grey", linestyle=x) for x in ("-", "--")]
    axes[0, 1].legend(lines, ["head by head", "mean of heads"], fontsize=8)
    return figure


def named(out: Path, part: Optional[str]) -> Path:
    """The path of a picture: `out`, with `part`, if any, added to the name."""
    return out if part is None else out.with_name(f"{out.stem}-{part}{out.suffix}")


def save(figures: Figures, out: Path, overwrite: bool = False) -> List[Path]:
    """Writes all figures or none, in the format of `out`'s suffix, and returns their paths."""
    paths = {named(out, part): figure for part, figure in figures.items()}
    with ExitStack() as stack:
        for path, figure in reversed(paths.items()):  # the last file appears last
            part = stack.enter_context(whole_or_not_at_all(path, overwrite))
            try:
                figure.savefig(part, bbox_inches="tight", format=path.suffix[1:].lower())
            except RuntimeError as error:  # such as LaTeX that matplotlibrc asks for
                raise ValueError(f"matplotlib cannot draw {path.name}: {error}") from error
    return list(paths)


def check_paths(out: Path, parts: Iterable[Optional[str]], overwrite: bool) -> None:
    """Raises ValueError or OSError if one of these pictures cannot be written."""
    if out.suffix.lstrip(".").lower() not in FORMATS:
        raise ValueError(f"--out must end in .{', .'.join(FORMATS)}, got {out}")
    for part in parts:
        check_output(named(out, part), overwrite)
