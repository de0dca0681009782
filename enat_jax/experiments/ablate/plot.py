"""The Pareto plot of an ablation: a score against FLOPs and against time."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

_ON_FRONT, _OTHERS = "#1f5fa8", "#8a8a8a"
_LABELLED = 40  # points: of more, only those on the front get their names


class Series(NamedTuple):
    """What is drawn of a point.

    Attributes:
        name: its label.
        gigaflop: per image, two FLOPs per multiply-add.
        seconds: per image.
        score: the mean over the seeds, less being better.
        deviation: of the score over the seeds; 0 draws no bar.
    """

    name: str
    gigaflop: float
    seconds: float
    score: float
    deviation: float


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The points that no other beats: none is at most as costly and at most as high in score.

    A point is beaten by one that is no worse in both and better in one. Less is better in both.

    Returns:
        Their places, by rising cost.
    """
    pairs = list(zip(costs, scores, strict=True))
    front = [
        i for i, (cost, score) in enumerate(pairs)
        if not any(c <= cost and s <= score and (c, s) != (cost, score) for c, s in pairs)
    ]  # fmt: skip
    return sorted(front, key=lambda i: pairs[i])


def draw_pareto(path: str | os.PathLike[str], points: Sequence[Series], score: str) -> None:
    """Draws both panels; the Pareto front is a line through filled marks.

    Args:
        path: of the PNG.
        points: at least one.
        score: the score's name.
    """
    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2, sharey=True)
    milliseconds = [1e3 * each.seconds for each in points]
    for axes, costs, title in (
        (panels[0], [each.gigaflop for each in points],
         "GFLOP per image by formula (2 per multiply-add)"),
        (panels[1], milliseconds, "ms per image, generation alone"),
    ):  # fmt: skip
        _panel(axes, costs, points, title)
    panels[0].set_ylabel(f"{score.replace('_', ' ')} (less is better)")
    canvas.draw()  # only now is it known where everything lies
    for axes in panels:
        _label(axes, canvas)
    figure.savefig(path)


def _panel(axes: Any, costs: Sequence[float], points: Sequence[Series], title: str) -> None:
    scores = [each.score for each in points]
    front = pareto_front(costs, scores)
    for index, each in enumerate(points):
        on_front = index in front
        axes.errorbar(
            costs[index], each.score, yerr=each.deviation or None, fmt="o", markersize=7,
            color=_ON_FRONT if on_front else _OTHERS, capsize=3, zorder=3,
            markerfacecolor=_ON_FRONT if on_front else "white",
        )  # fmt: skip
    axes.plot([costs[i] for i in front], [scores[i] for i in front],
              color=_ON_FRONT, linewidth=1.2, zorder=2, label="Pareto front")  # fmt: skip
    axes.set_xlabel(title)
    if max(costs) > 8 * min(costs) > 0:
        axes.set_xscale("log")
    axes.margins(0.15)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, loc="upper right")
    named = range(len(points)) if len(points) <= _LABELLED else front
    axes.to_label = [(costs[i], scores[i], points[i].name) for i in named]


def _label(axes: Any, canvas: FigureCanvasAgg) -> None:
    """Writes each point's name beside it, where it covers no other mark or name if it can."""
    renderer = canvas.get_renderer()
    marks = axes.transData.transform([(x, y) for x, y, _ in axes.to_label])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    inside = axes.get_window_extent(renderer)
    for (x, y, name), _ in zip(axes.to_label, marks, strict=True):
        best = None
        for distance in (8, 16, 28, 42):
            for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)):
                text = axes.annotate(
                    name, (x, y), xytext=(dx * distance, dy * distance),
                    textcoords="offset points", fontsize=8, va="center",
                    ha={1: "left", 0: "center", -1: "right"}[dx],
                    arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.6}
                    if distance > 8 else None,
                )  # fmt: skip
                text.update_positions(renderer)
                box = Text.get_window_extent(text, renderer)  # without the line to the mark
                own = (box.x0, box.y0, box.x1, box.y1)
                hidden = sum(_overlap(own, other) for other in taken)
                hidden += _outside(own, (inside.x0, inside.y0, inside.x1, inside.y1))
                text.remove()
                if best is None or hidden < best[0]:
                    best = hidden, text, own
            if best is not None and best[0] == 0:
                break
        assert best is not None
        axes.add_artist(best[1])
        taken.append(best[2])


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The area that two boxes share, in square pixels."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(np.prod(np.maximum(sides, 0.0)))


def _outside(box: tuple[float, ...], around: tuple[float, ...]) -> float:
    """The area of a box beyond another."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(area - _overlap(box, around), 0.0)
