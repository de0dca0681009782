"""The Pareto plot of an ablation: a score against FLOPs and against time."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from enat_jax.files import Path, atomic

_NAMES = 30  # in a column of the legend


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The places, by rising cost, of the points that no other beats: less is better in both.

    A point is beaten by one that is no worse in both and better in one.
    """
    pairs = list(zip(costs, scores, strict=True))
    front = [
        i for i, (cost, score) in enumerate(pairs)
        if not any(c <= cost and s <= score and (c, s) != (cost, score) for c, s in pairs)
    ]  # fmt: skip
    return sorted(front, key=pairs.__getitem__)


def draw_pareto(path: Path, points: Sequence[Mapping[str, Any]], score: str) -> None:
    """Draws both panels of rows of the summary; the front is a line through filled marks.

    A point has the same colour in both, which stands beside its name in the legend. There is at
    least one row, and all have finite values of the `score`; less is better.
    """
    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    scores = [each[score] for each in points]
    gigaflop = [each["gigaflop_per_image"] for each in points]
    milliseconds = [1e3 / each["images_per_second"] for each in points]
    colours = colormaps["turbo"](np.linspace(0, 1, len(points)))
    for axes, costs, title in (
        (panels[0], gigaflop, "GFLOP per image by formula (2 per multiply-add)"),
        (panels[1], milliseconds, "ms per image, generation alone"),
    ):
        front = pareto_front(costs, scores)
        for i, each in enumerate(points):
            axes.errorbar(
                costs[i], scores[i], yerr=each[f"{score}_deviation"] or None, fmt="o",
                markersize=7, color=colours[i], capsize=3, zorder=3, label=each["point"],
                markerfacecolor=colours[i] if i in front else "white",
            )  # fmt: skip
        axes.plot([costs[i] for i in front], [scores[i] for i in front],
                  color="#8a8a8a", linewidth=1.2, zorder=2, label="Pareto front")  # fmt: skip
        axes.set_xlabel(title)
        if max(costs) > 8 * min(costs) > 0:
            axes.set_xscale("log")
        axes.margins(0.15)
        axes.grid(color="#e4e4e4", linewidth=0.6)
    panels[0].set_ylabel(f"{score.replace('_', ' ')} (less is better)")
    marks, names = panels[0].get_legend_handles_labels()
    columns = 1 + len(points) // _NAMES
    figure.legend(marks, names, loc="outside right upper", frameon=False, fontsize=8, ncols=columns)
    with atomic(path) as part:
        figure.savefig(part, format=os.path.splitext(path)[1][1:])
