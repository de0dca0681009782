"""An ablation from its config to its table, plots and sheet."""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from enat_jax.errors import UserError
from enat_jax.evaluation.objective import Objective, is_finite, make_objective
from enat_jax.experiments.ablate.config import SECTIONS, AblateConfig
from enat_jax.experiments.ablate.measure import Generators, Speed
from enat_jax.experiments.ablate.plot import Series, draw_pareto
from enat_jax.experiments.ablate.points import (
    AblateError,
    Point,
    by_program,
    check_points,
    identity,
    settings,
)
from enat_jax.experiments.ablate.sheet import keep_tiles, write_sheet
from enat_jax.experiments.ablate.table import Row, Table
from enat_jax.parallel.hosts import several
from enat_jax.parallel.placement import Placement


def ablate(
    cfg: AblateConfig,
    out: str | os.PathLike[str],
    *,
    workdir: str | None = None,
    say: Callable[[str], object] = print,
) -> Table:
    """Measures all points of an ablation, or those that an earlier call left.

    Writes to `out`: `results.csv`, a row per point and seed; `summary.csv`, a row per point, with
    the mean of every score and its sample deviation over the seeds; `pareto.png`, the first score
    against FLOPs and against time; `sheet.png`, a row of images per point, the same noise and
    classes in all of them; `about.json`, what the rows belong to; `tiles/`, the sheet's images.

    Args:
        cfg: what is compared.
        out: a folder, new or of the same ablation.
        workdir: the run of points that name none.
        say: called with lines for the user.

    Returns:
        The whole table.

    Raises:
        UserError: points that cannot be, all of them at once; a folder of another ablation; or
            several hosts.
    """
    if several():
        raise AblateError("ablate runs on one host, with any number of devices")
    points = check_points(settings(cfg, workdir), warn=say)
    objectives = _objectives(cfg, points)
    about = {
        **dataclasses.asdict(cfg),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "run": {point.name: identity(point) for point in points},
    }
    order = [(point.name, seed) for point in points for seed in cfg.seeds]
    scores = objectives[_judged(points[0])].names
    folder = pathlib.Path(out)
    table = Table(folder, about, order, scores)
    missing = table.missing()
    planned = f"{len(points)} points, {len({(p.generator, p.layout) for p in points})} programs"
    say(f"{planned}, {len(missing)} of {len(order)} rows to measure")
    _measure(cfg, points, objectives, table, say)
    drawn = [
        Series(row["point"], row["gigaflop_per_image"], 1 / row["images_per_second"],
               row[scores[0]], row[f"{scores[0]}_deviation"] or 0.0)
        for row in table.summary()
        if math.isfinite(row[scores[0]])
    ]  # fmt: skip
    if drawn:
        draw_pareto(folder / "pareto.png", drawn, scores[0])
    wrote = ["results.csv", "summary.csv", *["pareto.png"] * bool(drawn)]
    if write_sheet(folder, [point.name for point in points]):
        wrote.append("sheet.png")
    say(f"wrote {', '.join(wrote)} to {folder}")
    return table


def _objectives(cfg: AblateConfig, points: list[Point]) -> dict[Any, Objective]:
    """What judges the points; it may depend on the network's sizes."""
    found, problems = {}, []
    for point in points:
        if _judged(point) in found:
            continue
        try:
            found[_judged(point)] = make_objective(
                cfg.objective, point.config, Placement.of(point.config.mesh)
            )
        except UserError as error:
            problems.append(f"{point.workdir}: {error}")
    if problems:
        raise AblateError("; ".join(dict.fromkeys(problems)))
    return found


def _judged(point: Point) -> Any:
    return point.config.model, point.config.tokenizer, point.config.mesh


def _measure(
    cfg: AblateConfig,
    points: list[Point],
    objectives: dict[Any, Objective],
    table: Table,
    say: Callable[[str], object],
) -> None:
    """Makes the rows that are missing, those that share a program together."""
    missing = set(table.missing())
    number = {point.name: index for index, point in enumerate(points)}
    cost = {point.name: point.flops * (1 + point.padding) for point in points}
    generators = Generators(warn=say)
    start, spent, count = time.perf_counter(), 0.0, 0
    for point in by_program(points):
        objective = objectives[_judged(point)]
        for seed in [seed for seed in cfg.seeds if (point.name, seed) in missing]:
            classes = np.arange(cfg.num_images) % point.config.model.num_classes
            earlier = table.of(point.name)
            speed = (
                Speed(earlier[0]["images_per_second"], earlier[0]["compile_seconds"])
                if earlier
                else generators.speed(point, classes, cfg.timed_batches)
            )
            keep = cfg.sheet if seed == cfg.seeds[0] else 0
            scores, images = generators.judge(point, objective, classes, seed=seed, keep=keep)
            if images is not None:
                keep_tiles(table.folder, number[point.name], images)
            table.add(_row(point, seed, cfg.num_images, scores, speed))
            count += 1
            spent += cost[point.name]
            left = sum(cost[name] for name, _ in table.missing())
            minutes = (time.perf_counter() - start) * left / spent / 60
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            odd = "" if is_finite(scores) else ", which is no score: it is left out of the plot"
            say(
                f"{count} of {len(missing)}: {point.name}, seed {seed}: {told}{odd},"
                f" {speed.images_per_second:.4g} images/s, {minutes:.1f} min left"
            )


def _row(point: Point, seed: int, num_images: int, scores: dict[str, float], speed: Speed) -> Row:
    gigaflop = point.flops / 1e9
    return {
        "point": point.name,
        "seed": seed,
        **scores,
        "gigaflop_per_image": gigaflop,  # two per multiply-add
        "gigamac_per_image": gigaflop / 2,  # the paper's unit
        "padding": point.padding,
        **speed._asdict(),
        "workdir": point.workdir,
        "checkpoint": point.model.step,
        "network": point.config.model.name,
        **{name: getattr(point.config.model, name, "") for name in SECTIONS["model"]},
        "num_images": num_images,
        **dataclasses.asdict(point.config.sample),
        **point.strategy,
        "steps": point.layout.steps,  # a strategy file has its own
    }
