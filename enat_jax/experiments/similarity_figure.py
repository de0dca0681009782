"""The figure of feature similarities: maps of a few images, and averages over many."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"new": "#c8502a", "previous": "#1f5fa8", "masked": "#4c9150", "all": "#555555"}
_NAMES = {
    "new": "newly revealed tokens",
    "previous": "tokens revealed before",
    "masked": "masked tokens",
    "all": "all tokens",
}


def draw(
    path: str | os.PathLike[str],
    cosine: Float[np.ndarray, "b s n"],
    new: Bool[np.ndarray, "b s n"],
    averages: Mapping[str, Mapping[str, Float[np.ndarray, " s"]]],
    grid: tuple[int, int],
) -> None:
    """Draws per image a row of newly revealed tokens over a row of similarities, then averages.

    Args:
        path: of the PNG.
        cosine: similarity of each token's features at steps t and t + 1.
        new: the tokens that step t revealed.
        averages: `mean` and `deviation` by group of tokens.
        grid: rows and columns of tokens.
    """
    images, pairs = cosine.shape[:2]
    height = 1.35 * 2 * images
    figure = Figure(figsize=(max(1.35 * pairs + 1.6, 8.0), height + 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(height + 0.6, 3.6))
    maps, below = parts
    panels: Any = maps.subplots(2 * images, pairs, squeeze=False)
    lowest = min(float(np.floor(10 * cosine.min()) / 10), 0.9)
    shown = None
    for image in range(images):
        for pair in range(pairs):
            above, under = panels[2 * image, pair], panels[2 * image + 1, pair]
            above.imshow(new[image, pair].reshape(grid), cmap="Greys", vmin=0, vmax=1.4)
            shown = under.imshow(
                cosine[image, pair].reshape(grid), cmap="viridis", vmin=lowest, vmax=1
            )
            for axes in (above, under):
                axes.set_xticks([])
                axes.set_yticks([])
            if image == 0:
                above.set_title(f"steps {pair + 1}-{pair + 2}", fontsize=9)
        panels[2 * image, 0].set_ylabel("revealed", fontsize=8)
        panels[2 * image + 1, 0].set_ylabel("similarity", fontsize=8)
    assert shown is not None
    maps.colorbar(shown, ax=panels, shrink=0.6, label="cosine similarity")

    axes: Any = below.subplots()
    steps = np.arange(1, pairs + 1)
    for place, (name, average) in enumerate(averages.items()):
        axes.errorbar(
            steps + 0.04 * (place - 1.5), average["mean"], yerr=average["deviation"], fmt="o-",
            markersize=4, capsize=2, linewidth=1.2, color=_COLOURS[name], label=_NAMES[name],
        )  # fmt: skip
    axes.set_xticks(steps, [f"{step}-{step + 1}" for step in steps])
    axes.set_xlabel("adjacent steps")
    axes.set_ylabel("cosine similarity, mean")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
