"""An ablation from its config to its table, plot and sheet."""

import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt8

from enat_jax.core.generate import Layout
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import Wants
from enat_jax.experiments.ablate.config import SECTIONS, AblateConfig
from enat_jax.experiments.ablate.plot import draw_pareto
from enat_jax.experiments.ablate.points import Point, make_points
from enat_jax.experiments.ablate.sheet import keep_tiles, write_sheet
from enat_jax.experiments.table import Row, Table, write_csv
from enat_jax.files import Path
from enat_jax.parallel.compilation import compile_seconds
from enat_jax.sampling.sampler import Sampler, restore, sampler_of

_COSTS = ("gigaflop_per_image", "gigamac_per_image", "padding")
_SPEED = ("images_per_second", "compile_seconds")  # of one program: the same for all seeds


def ablate(
    cfg: AblateConfig,
    out: Path,
    *,
    workdir: str | None = None,
    log: Callable[[str], object] = print,
) -> Table:
    """Measures all points of an ablation, or those that an earlier call left; gives `results.csv`.

    Writes to `out`: `results.csv`, a row per point and seed; `summary.csv`, a row per point, with
    the mean of every score and its sample deviation over the seeds; `pareto.png`, the first score
    against FLOPs and against time; `sheet.png`, a row of images per point, the same noise and
    classes in all of them; `about.json`, what the rows belong to; `tiles/`, the sheet's images.
    Points that name no run are of `workdir`.

    Raises:
        UserError: points that cannot be, all of them at once; a folder of another ablation; or
            several hosts.
    """
    if jax.process_count() > 1:
        raise UserError(f"ablate runs on one host, not on {jax.process_count()}")
    points = make_points(cfg, workdir, log=log)
    folder, scores = pathlib.Path(out), points[0].objective.names
    columns = {
        **{"point": str, "seed": int},
        **dict.fromkeys((*scores, *_COSTS, *_SPEED), float),
        **dict.fromkeys(_settings(points[0], cfg), str),
    }
    about = {
        **dataclasses.asdict(cfg),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "run": {point.name: point.identity() for point in points},
    }
    order = [(point.name, seed) for point in points for seed in cfg.seeds]
    table = Table(folder / "results.csv", columns, keys=2, about=about, order=order)
    programs = {(point.generator, point.layout) for point in points}
    log(
        f"{len(points)} points, {len(programs)} programs, {len(table.missing())} of {len(order)}"
        " rows to measure"
    )
    _measure(cfg, points, table, log)
    wrote = ["results.csv", "summary.csv"]
    drawn = [row for row in summary(table, scores) if math.isfinite(row[scores[0]])]
    if drawn:
        draw_pareto(folder / "pareto.png", drawn, scores[0])
        wrote.append("pareto.png")
    if write_sheet(folder, [point.name for point in points]):
        wrote.append("sheet.png")
    log(f"wrote {', '.join(wrote)} to {folder}")
    return table


def summary(table: Table, scores: Sequence[str]) -> list[Row]:
    """One row per point: the scores' means, and their sample deviations where seeds differ."""
    means = []
    for point, rows in itertools.groupby(table.rows.values(), key=lambda row: row["point"]):
        rows = list(rows)
        mean = {"point": point, "seeds": len(rows), **rows[0]}
        del mean["seed"]
        for name in scores:
            values = [row[name] for row in rows]
            finite = all(map(math.isfinite, values))
            deviation = "" if len(rows) == 1 else statistics.stdev(values) if finite else math.nan
            mean |= {name: statistics.fmean(values), f"{name}_deviation": deviation}
        means.append(mean)
    return means


def _measure(
    cfg: AblateConfig, points: Sequence[Point], table: Table, log: Callable[[str], object]
) -> None:
    """Makes the rows that are missing, those that share a sampler or a run together."""
    missing = [(point, seed) for point in points for seed in cfg.seeds
               if (point.name, seed) not in table.rows]  # fmt: skip
    numbers = {point.name: number for number, point in enumerate(points)}
    shared: dict[Any, dict[str, list[tuple[Point, int]]]] = {}
    for point, seed in missing:
        runs = shared.setdefault(point.generator, {})
        runs.setdefault(point.workdir, []).append((point, seed))
    start, done = time.perf_counter(), 0
    for runs in shared.values():
        sampler, compiled = None, {}  # gives its memory back before the next is made
        for of_run in runs.values():
            sampler = _with_weights(of_run[0][0], sampler, log)
            for point, seed in of_run:
                earlier = [row for row in table.rows.values() if row["point"] == point.name]
                speed = earlier[0] if earlier else _speed(sampler, point, cfg, compiled)
                scores, images = _scores(sampler, point, cfg, seed)
                if images is not None:
                    keep_tiles(table.path.parent, numbers[point.name], images)
                table.add(_row(point, seed, cfg, scores, speed))
                means = summary(table, list(scores))
                write_csv(table.path.with_name("summary.csv"), means[0], means)
                done += 1
                minutes = (time.perf_counter() - start) / 60 * (len(missing) / done - 1)
                text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                if not math.isfinite(next(iter(scores.values()))):
                    text += ", which is no score: it is left out of the plot"
                log(
                    f"{done} of {len(missing)}: {point.name}, seed {seed}:"
                    f" {text}, {speed[_SPEED[0]]:.4g} images/s, {minutes:.1f} min left"
                )


def _with_weights(point: Point, sampler: Sampler | None, log: Callable[[str], object]) -> Sampler:
    """A point's sampler: the one given, if any, which then takes the weights of the point's run."""
    restored = restore(point.workdir, step=point.checkpoint, warn=log)
    if sampler is None:
        return sampler_of(restored._replace(config=point.config))
    sampler.update(restored.ema)
    return sampler


def _speed(
    sampler: Sampler, point: Point, cfg: AblateConfig, compiled: dict[Layout, float]
) -> dict[str, float]:
    """How fast a point generates token ids; turning them into images is the same for all.

    `compiled` has the seconds that compiling took by layout, which the first point of each tells.
    """
    size, times = sampler.program.batch_size(cfg.num_images), []
    classes = np.resize(_class_ids(point, cfg), size * (1 + cfg.timed_batches))
    batches = sampler.batches(
        **point.objective.asked(classes),
        output="token_ids",
        batch_size=size,
        **dataclasses.asdict(point.config.strategy),
    )
    before = compile_seconds()
    for _ in range(1 + cfg.timed_batches):
        start = time.perf_counter()
        jax.block_until_ready(next(batches))
        times.append(time.perf_counter() - start)
    seconds = compiled.setdefault(point.layout, compile_seconds() - before)
    return dict(zip(_SPEED, (size / statistics.median(times[1:]), seconds), strict=True))


def _scores(
    sampler: Sampler, point: Point, cfg: AblateConfig, seed: int
) -> tuple[dict[str, float], UInt8[np.ndarray, "k y x 3"] | None]:
    """The scores of a point's images with one seed, and those for the sheet, if any."""
    program, objective = sampler.program, point.objective

    def decoded(token_ids: Array, output: Wants) -> Array:
        if output == "token_ids":
            return token_ids
        return program.decode(program.decoder(output), token_ids, output=output)

    shown = cfg.sheet if seed == cfg.seeds[0] and sampler.tokenizer is not None else 0
    scorer, classes, images, done = objective.start(), _class_ids(point, cfg), [], 0
    asked = objective.asked(classes) | dataclasses.asdict(point.config.strategy)
    for count, token_ids in sampler.batches(**asked, output="token_ids", seed=seed):
        scorer.add(decoded(token_ids, objective.wants), classes[done : done + count])
        if done < shown:
            images.append(np.asarray(decoded(token_ids, "uint8"))[: min(count, shown - done)])
        done += count
    return scorer.value(), np.concatenate(images) if images else None


def _class_ids(point: Point, cfg: AblateConfig) -> Int[np.ndarray, " b"]:
    return np.arange(cfg.num_images) % point.objective.kinds(point.config.model.num_classes)


def _row(point: Point, seed: int, cfg: AblateConfig, scores: Row, speed: Row) -> Row:
    costs = (point.flops / 1e9, point.flops / 2e9, point.padding)  # 2 FLOPs per multiply-add
    own = {"point": point.name, "seed": seed, **scores, **dict(zip(_COSTS, costs, strict=True))}
    return {**speed, **own, **_settings(point, cfg)}


def _settings(point: Point, cfg: AblateConfig) -> dict[str, Any]:
    config = point.config
    return {
        "workdir": point.workdir,
        "checkpoint": point.checkpoint,
        "network": config.model.name,
        **{name: getattr(config.model, name, "") for name in SECTIONS["model"]},
        "num_images": cfg.num_images,
        **dataclasses.asdict(config.sample),
        **dataclasses.asdict(config.strategy),
        "steps": point.layout.steps,  # a strategy file has its own
    }
