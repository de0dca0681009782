"""Scores a generator: images are made, looked at and forgotten, batch by batch."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from enat_jax.checkpoints.digests import file_digest, weights_digest
from enat_jax.errors import UserError, differences
from enat_jax.evaluation.digits import real_halves
from enat_jax.evaluation.emoji import Cells
from enat_jax.evaluation.metric import Objective, Scorer, Wants
from enat_jax.evaluation.objective import evaluated
from enat_jax.files import Path, write_arrays, write_json
from enat_jax.parallel import hosts
from enat_jax.parallel.hosts import from_primary, is_primary
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.sampler import Restored, Sampler, sampler_of
from enat_jax.tokenizers.protocol import as_uint8

ENOUGH = 2048  # images: fewer leave the covariance of the pool features short of full rank


def evaluate(
    restored: Restored,
    out: Path | None = None,
    *,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Scores a generator: FID, sFID, Inception Score, precision and recall; or by other metrics.

    Images are class-balanced: image i is of class i modulo the number of classes. What was added up
    is saved beside `out` every `evaluate.save_every` images, and an evaluation that was stopped
    goes on from there, on the same or another number of processes; the file is removed when the
    result is written. The primary process alone reads and writes; all call it together.

    Returns:
        What is written to the `.json` at `out`, if any: `scores` by protocol, and everything that
        determines them.

    Raises:
        UserError: weights or reference statistics that are missing or wrong, a generator without
            a tokenizer, features that are not finite, or an unfinished evaluation of something
            else beside `out`.
    """
    say = hosts.primary_only(say)
    config, cfg = restored.config, restored.config.evaluate
    objectives = evaluated(config, Placement.of(config.mesh))
    sampler = sampler_of(restored)
    names = objectives[0].names
    if cfg.metrics == "inception" and cfg.num_images < ENOUGH:
        say(
            f"warning: FID of {cfg.num_images} images is biased upwards and not comparable: fewer"
            f" than {ENOUGH} images cannot fill a covariance of {ENOUGH} features"
        )
    if cfg.metrics == "inception" and cfg.precision_recall and "recall" not in names:
        say(f"no precision and recall: {cfg.reference} holds no features of single images")
    about = _identity(restored, sampler, seed)
    hosts.require_agreement(about)
    scorers: dict[Wants, Scorer] = {each.wants: each.start() for each in objectives}
    unfinished = None if out is None else _Unfinished(f"{out}.unfinished.npz", about, scorers)
    done = saved = from_primary(unfinished.read) if unfinished else 0
    if done:
        say(f"going on from image {done}")
    kinds = objectives[0].kinds(config.model.num_classes)
    total, classes = cfg.num_images, np.arange(cfg.num_images) % kinds
    if cfg.metrics == "digits":
        classes = np.sort(classes)  # what the README's figures are of
    looks = _looks(sampler, objectives, classes, seed, done)
    hidden = None if is_primary() else True  # None: hidden where nobody looks
    with tqdm(total=total, initial=done, unit="image", disable=hidden) as bar:
        # a batch is added up when the next is asked for: the devices work on that one
        for (count, looked), _ in itertools.pairwise(itertools.chain(looks, [(0, {})])):
            for wants, seen in looked.items():
                scorers[wants].add_seen(seen, classes[done : done + count])
            done += count
            bar.update(count)
            if done - saved >= cfg.save_every or done == total:  # scoring can fail, too
                if not all(scorer.finite for scorer in scorers.values()):
                    raise UserError(f"features of the first {done} images are infinite or NaN")
                if unfinished:
                    from_primary(functools.partial(unfinished.write, done))
                saved = done
    scores: dict[str, Any] = {wants: scorer.value() for wants, scorer in scorers.items()}
    if cfg.metrics == "digits":
        scores = {"generated": scores["token_ids"], "real": real_halves()}
        say(f"{total} generated digits: {sampler.describe()}")
        for name, each in zip(("generated", "real, half to half"), scores.values(), strict=True):
            say(
                f"{name:20} accuracy {each['accuracy']:.3f}"
                f"   Frechet distance of pixels {each['frechet_distance']:.1f}"
            )
    if cfg.metrics == "emoji" and sampler.tokenizer:
        cells, grid = Cells(config.images.data_dir, config.images.split), config.tokenizer.grid
        scores = {
            "generated": scores["uint8"],
            "reconstructed": cells.ceiling(sampler.tokenizer, grid),
            **cells.floors(grid[0] * sampler.tokenizer.patch),
        }
        say(f"{total} emojis of {config.images.split} captions: {sampler.describe()}")
        for name, each in scores.items():
            shares = (f"{what} {share:.3f}" for what, share in each.items() if what != "error")
            say(f"{name:15}{'   '.join(shares)}")
    result = {"scores": scores, **about}
    if out is not None and is_primary():
        write_json(out, result)
        pathlib.Path(f"{out}.unfinished.npz").unlink()
    return result


def _looks(
    sampler: Sampler, objectives: list[Objective], classes: np.ndarray, seed: int, first: int
) -> Iterator[tuple[int, dict[Wants, Any]]]:
    """Asks the devices, without waiting, for batches: how many count, and what is seen of each."""
    output: Wants = "token_ids" if objectives[0].wants == "token_ids" else "floats"
    as_levels = jax.jit(as_uint8)
    asked = objectives[0].asked(classes)
    for count, made in sampler.batches(**asked, output=output, seed=seed, first=first):
        yield count, {each.wants: each.look(as_levels(made) if each.wants == "uint8" else made)
                      for each in objectives}  # fmt: skip


def _identity(restored: Restored, sampler: Sampler, seed: int) -> dict[str, Any]:
    """Everything that determines the scores, for the result and to know an old state by."""
    config, cfg = restored.config, restored.config.evaluate
    files = {
        name: path for name in ("inception", "reference", "prompts") if (path := getattr(cfg, name))
    }
    return {
        "images": cfg.num_images,
        "seed": seed,
        "strategy": dataclasses.asdict(config.strategy),
        "strategy_by_step": {  # what a strategy file held, not only where it was
            name: np.asarray(values).tolist()
            for name, values in dataclasses.asdict(sampler.program.strategy()).items()
        },
        "step": restored.step,
        "model": dataclasses.asdict(config.model),
        "model_digest": weights_digest(jax.tree.map(hosts.all_gather, restored.ema)),
        "tokenizer": config.tokenizer.name,
        "tokenizer_dtype": config.tokenizer.dtype,
        "tokenizer_digest": sampler.tokenizer.digest if sampler.tokenizer else "",
        "decode_batch_size": sampler.program.decode_batch_size,
        "reference": pathlib.Path(cfg.reference).name,
        **{f"{name}_sha256": file_digest(path) for name, path in files.items()},
        "protocol": cfg.protocol,
        "metrics": cfg.metrics,
        **({"split": config.images.split} if cfg.metrics == "emoji" else {}),
    }


class _Unfinished:
    """The file that an evaluation goes on from; the primary process alone calls this."""

    def __init__(self, path: str, about: dict[str, Any], scorers: dict[Wants, Scorer]):
        self._path, self._about, self._scorers = pathlib.Path(path), about, scorers

    def read(self) -> int:
        """Gives the scorers what was saved; returns how many images are done."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return 0
        try:
            with open(self._path, "rb") as content, np.load(content, allow_pickle=False) as file:
                arrays = dict(file)
            about = json.loads(str(arrays["about"]))
        except Exception as error:  # NumPy lets pass what zip files raise
            raise UserError(f"cannot read {self._path}: {error}; remove it") from error
        if other := differences(about, self._about):
            raise UserError(
                f"{self._path} belongs to another evaluation ({other}): remove it, or choose"
                " another --out"
            )
        for wants, scorer in self._scorers.items():
            prefix = f"{wants}/"
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            scorer.restore(own)
        return int(arrays["done"])

    def write(self, done: int) -> None:
        """Saves what was added up of so many images."""
        arrays = {f"{wants}/{name}": array for wants, scorer in self._scorers.items()
                  for name, array in scorer.arrays().items()}  # fmt: skip
        write_arrays(self._path, {"about": json.dumps(self._about), "done": done, **arrays})
