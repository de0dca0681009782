"""The Pareto plot of an ablation: a score against FLOPs and against time."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_ON_FRONT, _OTHERS = "#1f5fa8", "#8a8a8a"
_LABELLED = 40  # points: of more, only those on the front get their names
_SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The points that no other beats: less is better in both.

    A point is beaten by one that is no worse in both and better in one.

    Returns:
        Their places, by rising cost.
    """
    pairs = list(zip(costs, scores, strict=True))
    front = [
        i for i, (cost, score) in enumerate(pairs)
        if not any(c <= cost and s <= score and (c, s) != (cost, score) for c, s in pairs)
    ]  # fmt: skip
    return sorted(front, key=pairs.__getitem__)


def draw_pareto(
    path: str | os.PathLike[str], points: Sequence[Mapping[str, Any]], score: str
) -> None:
    """Draws both panels; the Pareto front is a line through filled marks.

    Args:
        path: of the PNG.
        points: rows of the summary, at least one, of finite scores.
        score: the score's name; less is better.
    """
    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2, sharey=True)
    scores = [each[score] for each in points]
    gigaflop = [each["gigaflop_per_image"] for each in points]
    milliseconds = [1e3 / each["images_per_second"] for each in points]
    for axes, costs, title in (
        (panels[0], gigaflop, "GFLOP per image by formula (2 per multiply-add)"),
        (panels[1], milliseconds, "ms per image, generation alone"),
    ):
        front = pareto_front(costs, scores)
        for i, each in enumerate(points):
            colour = _ON_FRONT if i in front else _OTHERS
            axes.errorbar(
                costs[i], scores[i], yerr=each[f"{score}_deviation"] or None, fmt="o",
                markersize=7, color=colour, capsize=3, zorder=3,
                markerfacecolor=colour if i in front else "white",
            )  # fmt: skip
        axes.plot([costs[i] for i in front], [scores[i] for i in front],
                  color=_ON_FRONT, linewidth=1.2, zorder=2, label="Pareto front")  # fmt: skip
        axes.set_xlabel(title)
        if max(costs) > 8 * min(costs) > 0:
            axes.set_xscale("log")
        axes.margins(0.15)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.legend(frameon=False, loc="upper right")
    panels[0].set_ylabel(f"{score.replace('_', ' ')} (less is better)")
    canvas.draw()  # only now is it known where everything lies
    for axes, costs in zip(panels, (gigaflop, milliseconds), strict=True):
        named = range(len(points)) if len(points) <= _LABELLED else pareto_front(costs, scores)
        _label(axes, canvas, [(costs[i], scores[i], points[i]["point"]) for i in named])
    figure.savefig(path)


def _label(axes: Any, canvas: FigureCanvasAgg, marks: Sequence[tuple[float, float, str]]) -> None:
    """Writes each point's name beside it, where it covers no other mark or name if it can."""
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    places = axes.transData.transform([(x, y) for x, y, _ in marks])
    taken = [Bbox([place - 5, place + 5]) for place in places]
    for x, y, name in marks:
        tried = []
        for distance, (dx, dy) in itertools.product((8, 16, 28, 42), _SIDES):
            text = axes.annotate(
                name, (x, y), xytext=(dx * distance, dy * distance), textcoords="offset points",
                fontsize=8, va="center", ha=("center", "left", "right")[dx],
                arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.6},
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line to the mark
            text.remove()
            covers = box.count_overlaps(taken)
            covers += not all(inside.contains(*corner) for corner in (box.min, box.max))
            tried.append((covers, text, box))
            if not covers:
                break
        _, text, box = min(tried, key=lambda each: each[0])
        axes.add_artist(text)
        taken.append(box)
