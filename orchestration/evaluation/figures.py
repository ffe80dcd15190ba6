"""The pictures of a report, as self-contained SVG. Colours are told apart by people with any colour vision: cividis for
amounts, Okabe and Ito's set together with a marker for methods."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from winnow.errors import Unsupported
from winnow.orchestration.evaluation.journal import Record
from winnow.orchestration.evaluation.maps import AttentionMap
from winnow.orchestration.evaluation.summary import CONTROL, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
_MARKERS = ("o", "s", "^", "D", "v", "p", "h", "<", ">")
_AMOUNTS = "cividis"
_DEPTH_BINS = 5
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.hashsalt": "winnow",
    "axes.edgecolor": "#777777",
}
_TINT = (0.90, 0.45, 0.0, 0.16)  # of what a method reads, over the blue of the attention mass
_LEAST_RECALL = 0.5  # the colours of recall begin here, so that the differences that matter can be seen


def check_installed() -> None:
    """Raises Unsupported where matplotlib is missing: an evaluation asks before it computes for hours."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Unsupported("report: its pictures need matplotlib; pip install 'winnow-llm[evaluation]' brings it") from None


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the house style, whatever the user's own settings of matplotlib are."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        check_installed()
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return styled


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that no global state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> bytes:
    """The figure as a bare <svg> element; the same figure gives the same bytes."""
    data = _saved(figure, "svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return data[data.index(b"<svg") :]


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG, for looking at it."""
    return _saved(figure, "png", dpi=dpi)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "winnow", "svg.fonttype": "path"}), io.BytesIO() as buffer:
        figure.savefig(buffer, format=kind, facecolor="white", **options)
        return buffer.getvalue()


def title_of(method: str, width: int = 30) -> str:
    """A method's spec on as many lines as it takes."""
    lines = [""]
    for piece in re.split(r"(?<=[:,])", method):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def tokens_text(n: int) -> str:
    """1024 as 1K, 1500 as 1500."""
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


@_styled
def needle_map(records: Sequence[Record], methods: Sequence[str], task: str) -> Figure:
    """Mean score of a task by prompt length and depth of the evidence, one panel for each method that was given the task."""
    mine = [r for r in records if r["task"] == task and r["depth"] is not None and "unsupported" not in r]
    methods = [method for method in methods if any(r["method"] == method for r in mine)]
    lengths = sorted({r["length"] for r in mine})
    asked = sorted({r["asked_depth"] for r in mine if r["asked_depth"] is not None})
    drawn = any(r["asked_depth"] is None for r in mine)
    edges = [bin_ / _DEPTH_BINS for bin_ in range(_DEPTH_BINS)]
    names = [f"{edge:.0%} to {edge + 1 / _DEPTH_BINS:.0%}" for edge in edges] if drawn else [_depth_name(d, mine) for d in asked]
    columns = min(len(methods), 4)
    lines = math.ceil(len(methods) / columns)
    width = max(1.5, 0.55 * len(lengths))
    figure = _new_figure(1.6 + columns * (width + 0.35), 0.6 + lines * (0.9 + 0.34 * len(names)))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    picture = None
    for axis, method in zip(axes.flat, methods, strict=False):
        cells: dict[tuple[int, int], list[float]] = {}
        for record in mine:
            if record["method"] == method:
                row = min(int(record["depth"] * _DEPTH_BINS), _DEPTH_BINS - 1) if drawn else asked.index(record["asked_depth"])
                cells.setdefault((row, lengths.index(record["length"])), []).append(record["score"])
        values = np.full((len(names), len(lengths)), np.nan)
        for at, scores in cells.items():
            values[at] = sum(scores) / len(scores)
        picture = _heat(axis, values)
        for (y, x), value in np.ndenumerate(values):
            _cell_text(axis, x, y, "" if math.isnan(value) else f"{value:.2f}".rstrip("0").rstrip("."), value)
        axis.set_title(title_of(method, max(18, int(width * 11))))
        axis.set_xticks(range(len(lengths)), [tokens_text(n) for n in lengths])
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(labelbottom=True)  # the panel below may be missing
    for axis in axes.flat[len(methods) :]:
        axis.set_visible(False)
    figure.supxlabel("prompt tokens", fontsize=9)
    figure.supylabel("depth of the evidence", fontsize=9)
    if picture is not None:
        figure.colorbar(picture, ax=axes, label="score", shrink=max(0.25, 0.8 / lines), pad=0.02)
    return figure


def _depth_name(asked: float, records: Sequence[Record]) -> str:
    """The depth asked for, and the real one where that is another."""
    real = float(np.mean([record["depth"] for record in records if record["asked_depth"] == asked]))
    return f"{asked:.0%}" if abs(real - asked) <= 0.03 else f"{asked:.0%} (at {real:.0%})"


def _heat(axis: Axes, values: NDArray[np.float64], low: float = 0.0) -> Any:
    """Cells without a value stay hatched."""
    axis.set_facecolor("white")
    axis.patch.set(hatch="////", edgecolor="#DDDDDD")
    return axis.imshow(values, vmin=low, vmax=1, cmap=_AMOUNTS, aspect="auto", interpolation="nearest")


def _cell_text(axis: Axes, x: int, y: int, text: str, value: float) -> None:
    axis.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if value > 0.55 else "white")


@_styled
def frontier(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Quality against time, one panel a length; the line joins methods that no other beats in both."""
    lengths = sorted({row.length for row in rows})
    answered = any(row.score is not None for row in rows)
    columns = min(len(lengths), 3)
    lines = math.ceil(len(lengths) / columns)
    per_line = max(1, min(4, int(3.3 * columns // 2.4)))
    legend_height = 0.3 + 0.2 * sum(max(title_of(m).count("\n") + 1 for m in methods[i : i + per_line])
                                    for i in range(0, len(methods), per_line))  # fmt: skip
    figure = _new_figure(1.0 + 3.3 * columns, 3.0 * lines + legend_height)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    ranges = {(row.method, row.length): row.time_range or (1.0, 1.0) for row in rows}
    for axis, length in zip(axes.flat, lengths, strict=False):
        points = [(row.time_ratio, row.quality, row.method) for row in rows if row.length == length]
        known = [(x, y, method) for x, y, method in points if x is not None and y is not None]
        best = [(x, y) for x, y, _ in known if not any(_beats(other, (x, y)) for other in known)]
        axis.step(*zip(*sorted(set(best)), strict=True), where="post", color="#BBBBBB", linewidth=1.5, zorder=1)
        axis.axvline(1.0, color="#555555", linewidth=1.0, linestyle=":", zorder=0)
        for x, y, method in known:
            colour, marker = mark_of(method, methods)
            axis.hlines(y, *ranges[method, length], color=colour, linewidth=1.2, alpha=0.6, zorder=2)
            (handles[method],) = axis.plot(  # hollow: what lies on top of another must not hide it
                x, y, marker, color=colour, markersize=13 if method == CONTROL else 8, markerfacecolor="none",
                markeredgewidth=1.8, clip_on=False, zorder=3,
            )  # fmt: skip
        axis.set_title(f"{tokens_text(length)} tokens")
        axis.set_xlabel("prefill time / dense")
        axis.tick_params(labelbottom=True)
        axis.grid(color="#EEEEEE")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(lengths) :]:
        axis.set_visible(False)
    _limits(axes.flat[0], [time for row in rows for time in (row.time_range or (1.0,))], [row.quality or 0.0 for row in rows])
    for line in axes:
        line[0].set_ylabel("mean score / dense's" if answered else "dense's perplexity / its own")
    shown = [method for method in methods if method in handles]
    figure.legend(
        [handles[m] for m in shown], [title_of(m) for m in shown], loc="outside lower center", ncols=per_line, frameon=False
    )
    return figure


def _limits(axis: Axes, times: Sequence[float], qualities: Sequence[float]) -> None:
    """Every bar and point within the axes, and a few percent not so large that they look like much."""
    fastest, slowest = min(1.0, *times), max(1.0, *times)
    if slowest > 4.0:  # else one slow method leaves the others no room
        axis.set_xscale("log")
        axis.set_xlim(0.85 * fastest, 1.15 * slowest)
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if fastest <= tick <= slowest]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    else:
        margin = max(0.2, 0.1 * (slowest - fastest))
        axis.set_xlim(max(0.0, fastest - margin), slowest + margin)
    axis.set_ylim(math.floor(10 * min(*qualities, 0.7)) / 10 - 0.03, max(1.0, *qualities) + 0.03)


def _beats(other: tuple[float, float, str], point: tuple[float, float]) -> bool:
    return other[0] <= point[0] and other[1] >= point[1] and (other[0], other[1]) != point


def mark_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """(colour, marker) of a method, the same in every picture; dense is black."""
    if method == CONTROL:
        return "black", "o"
    place = [name for name in methods if name != CONTROL].index(method)
    return _COLOURS[place % len(_COLOURS)], _MARKERS[(place + place // len(_COLOURS) + 1) % len(_MARKERS)]


@_styled
def head_maps(density: NDArray[np.float64], recall: NDArray[np.float64], method: str) -> Figure:
    """Density and mean recall of every layer and query head, [L, Hq] each."""
    layers, heads = density.shape
    figure = _new_figure(10.0, 1.3 + min(4.0, 0.14 * heads))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values, name, low in zip(
        axes, (density, recall), ("density", "recall of attention mass"), (0.0, _LEAST_RECALL), strict=True
    ):
        picture = _heat(axis, values.T, low)
        figure.colorbar(picture, ax=axis, pad=0.01, extend="min" if low and values.min() < low else "neither")
        axis.set_title(name)
        axis.set_xlabel("layer")
        axis.set_xticks(_ticks(layers))
        axis.set_yticks(_ticks(heads))
    axes[0].set_ylabel("query head")
    figure.suptitle(title_of(method, 60), fontsize=10, fontweight="bold")
    return figure


def _ticks(n: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if n / step <= 12)
    return list(range(0, n, step))


@_styled
def attention_picture(picture: AttentionMap, method: str) -> Figure:
    """Attention mass of one head, with what the method reads tinted and framed."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    figure = _new_figure(5.0, 4.1)
    axis = figure.subplots()
    n, side = picture.n_tokens, picture.mass.shape[0]
    edge = side * picture.cell
    future = np.triu(np.ones((side, side), bool), 1)
    mass = np.where(future, np.nan, np.maximum(picture.mass, 1e-6))
    extent = (0, edge, edge, 0)
    shown = axis.imshow(mass, norm=LogNorm(1e-4, 1.0), cmap=_light_map(), extent=extent, interpolation="nearest")
    kept = picture.kept > 0
    if not bool((kept | future).all()):
        tint = np.zeros((side, side, 4))
        tint[kept & ~future] = _TINT
        axis.imshow(tint, extent=extent, interpolation="nearest")
        axis.add_collection(
            LineCollection(_outlines(kept | future, picture.cell), colors="#D55E00", linewidths=0.9, capstyle="projecting")
        )
    axis.set_xlim(0, n)
    axis.set_ylim(n, 0)
    axis.set_xlabel("key position")
    axis.set_ylabel("query position")
    axis.set_title(title_of(method, 40))
    axis.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(shown, ax=axis, shrink=0.8, pad=0.02)
    bar.set_label("attention mass, mean over rows")
    return figure


def _light_map() -> Any:
    """White for nothing to dark blue: single-hued, so that the orange outlines stand out for everybody."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ["#FFFFFF", "#D6E6F4", "#9CC7E0", "#4F97C6", "#1B5C9E", "#08234F"]
    return LinearSegmentedColormap.from_list("mass", stops).with_extremes(bad="#F2F2F2")


def _outlines(kept: NDArray[np.bool_], cell: int) -> list[list[tuple[int, int]]]:
    """Borders between kept cells and others, as line segments in tokens."""
    framed = np.pad(kept, 1, constant_values=True)  # no line along the frame of the picture
    segments = []
    for y, x in zip(*np.nonzero(framed[1:, :] != framed[:-1, :]), strict=True):  # a border above row y of `kept`
        segments.append([((x - 1) * cell, y * cell), (x * cell, y * cell)])
    for y, x in zip(*np.nonzero(framed[:, 1:] != framed[:, :-1]), strict=True):
        segments.append([(x * cell, (y - 1) * cell), (x * cell, y * cell)])
    return segments
