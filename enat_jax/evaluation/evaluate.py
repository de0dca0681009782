"""Scores a generator: images are made, looked at and forgotten, batch by batch."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from enat_jax.checkpoints.digests import file_digest, weights_digest
from enat_jax.config import EvaluateConfig
from enat_jax.errors import UserError, differences
from enat_jax.evaluation.collected import Collected
from enat_jax.evaluation.features import FeatureExtractor
from enat_jax.evaluation.inception import Features
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.evaluation.moments import local_rows
from enat_jax.evaluation.reference import read_reference
from enat_jax.files import write_arrays, write_json
from enat_jax.parallel.hosts import (
    all_gather,
    from_primary,
    is_primary,
    primary_only,
    require_agreement,
)
from enat_jax.sampling.sampler import Restored, Sampler, sampler_of
from enat_jax.tokenizers.levels import as_uint8

T = TypeVar("T")
ENOUGH = 2048  # images: fewer leave the covariance of the pool features short of full rank


class EvaluateError(UserError):
    """An evaluation that cannot be made or gone on with."""


def evaluate(
    restored: Restored,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Scores a generator by FID, sFID, Inception Score, precision and recall.

    Images are class-balanced: image i is of class i modulo the number of classes. What was
    gathered is saved beside `out` every `evaluate.save_every` images, and an evaluation that was
    stopped goes on from there, on the same or another number of hosts; these files are removed
    when the result is written. Process 0 alone reads and writes them; all hosts call it together.

    Args:
        restored: the generator and its config.
        out: the `.json` to write.
        seed: of the noise.
        say: called with lines for the user.

    Returns:
        What is written: `scores` by protocol, and everything that determines them.

    Raises:
        UserError: weights or reference statistics that are missing or wrong, a generator without
            a tokenizer, or an unfinished evaluation of something else beside `out`.
    """
    say = primary_only(say)
    cfg = restored.config.evaluate
    missing = [name for name in ("inception", "reference") if not getattr(cfg, name)]
    if missing:
        raise EvaluateError(
            f"config: evaluate.{' and evaluate.'.join(missing)} must name"
            f" {'files' if len(missing) > 1 else 'a file'}"
        )
    if restored.config.tokenizer.name == "none":
        raise EvaluateError("tokenizer.name is 'none': this model gives token ids, not images")
    reference = read_reference(cfg.reference)
    inception = load_inception(cfg.inception, digest=cfg.inception_digest)
    sampler = sampler_of(restored)
    if cfg.num_images < ENOUGH:
        say(
            f"warning: FID of {cfg.num_images} images is biased upwards and not comparable: fewer"
            f" than {ENOUGH} images cannot fill a covariance of {ENOUGH} features"
        )
    about = _identity(restored, sampler, seed)
    require_agreement(about)
    keep_features = cfg.precision_recall and reference.features is not None
    if cfg.precision_recall and not keep_features:
        say(f"no precision and recall: {cfg.reference} holds no features of single images")
    state = _State(pathlib.Path(out), cfg, about, keep_features)
    at_once = min(cfg.batch_size, restored.config.sample.batch_size)
    shards = sampler.placement.batch_shards
    if sampler.program.batch_size(cfg.num_images) < shards * at_once:
        say(
            f"sample.batch_size = {restored.config.sample.batch_size} leaves room: each of {shards}"
            f" devices looks at {at_once} images at a time"
        )
    extract = FeatureExtractor(inception, sampler.placement, at_once=at_once)
    saved = state.done
    for done in _run(sampler, state, extract, seed, say):
        if done - saved >= cfg.save_every or done == cfg.num_images:  # scoring can fail, too
            state.save()
            saved = done

    def result() -> dict[str, Any]:  # of process 0, where a save leaves everything
        scores = {name: each.scores(reference) for name, each in state.collected.items()}
        found = {"scores": scores, **about}
        write_json(out, found)
        state.remove()
        return found

    return from_primary(result)


def _run(
    sampler: Sampler,
    state: "_State",
    extract: FeatureExtractor,
    seed: int,
    say: Callable[[str], object],
) -> Iterator[int]:
    """Makes the images that are still to be made; yields how many are done."""
    total, start = sampler.config.evaluate.num_images, state.done
    if start:
        say(f"going on from image {start}")
    if start == total:
        return
    hidden = None if is_primary() else True  # None: hidden where nobody looks
    with tqdm(total=total, initial=start, unit="image", disable=hidden) as bar:
        for count, made in _one_ahead(_features(sampler, state, extract, seed)):
            ids = np.arange(state.done, state.done + sampler.program.batch_size(total))
            own = local_rows(sampler.placement.put(ids.astype(np.int32), sampler.placement.batch))
            real = own < total  # the last batch is filled up
            for protocol, (features, single) in made.items():
                collected = state.collected[protocol]
                collected.add(jax.tree.map(lambda x, r=real: local_rows(x)[r], features), own[real])
                if collected.features is not None:
                    collected.keep(np.asarray(single)[:count], ids[:count])
            state.done += count
            bar.update(count)
            yield state.done


def _features(
    sampler: Sampler, state: "_State", extract: FeatureExtractor, seed: int
) -> Iterator[tuple[int, dict[str, tuple[Features, Array]]]]:
    """Asks the devices for batches of images and their features, without waiting for them.

    Yields:
        The number of images that count; and by protocol their features, split over the devices by
        image, and where single ones are kept the pool features once more, whole on every host.
    """
    classes = np.arange(sampler.config.evaluate.num_images) % sampler.config.model.num_classes
    as_levels = jax.jit(as_uint8)
    share = _same
    if state.keeps_features and jax.process_count() > 1:
        share = jax.jit(_same, out_shardings=sampler.placement.replicated)
    batches = sampler.batches(classes, output="floats", seed=seed, first=state.done)
    for count, floats in batches:
        made = {}
        for protocol in state.collected:
            features = extract(floats if protocol == "floats" else as_levels(floats))
            made[protocol] = features, share(features.pool)
        yield count, made


def _same(array: Array) -> Array:
    return array


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each handed out when the next is there: the devices work on that one."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def _identity(restored: Restored, sampler: Sampler, seed: int) -> dict[str, Any]:
    """Everything that determines the scores, for the result and to know an old state by."""
    config, cfg = restored.config, restored.config.evaluate
    assert sampler.tokenizer is not None  # `evaluate` has seen to it
    return {
        "images": cfg.num_images,
        "seed": seed,
        "strategy": dataclasses.asdict(config.strategy),
        "strategy_by_step": {  # what a strategy file said, not only where it was
            name: np.asarray(values).tolist()
            for name, values in dataclasses.asdict(sampler.strategy()).items()
        },
        "step": restored.step,
        "model": dataclasses.asdict(config.model),
        "model_digest": weights_digest(jax.tree.map(all_gather, restored.ema)),
        "tokenizer": config.tokenizer.name,
        "tokenizer_dtype": config.tokenizer.dtype,
        "tokenizer_digest": sampler.tokenizer.digest,
        "decode_batch_size": sampler.program.decode_batch_size,
        "inception_sha256": file_digest(cfg.inception),
        "reference": pathlib.Path(cfg.reference).name,
        "reference_sha256": file_digest(cfg.reference),
        "protocol": cfg.protocol,
    }


class _State:
    """What was gathered so far, and where it is kept meanwhile.

    After a save, process 0 has all that was gathered, and the other hosts have nothing: files are
    its alone, and any number of hosts can go on from them.
    """

    def __init__(
        self, out: pathlib.Path, cfg: EvaluateConfig, about: dict[str, Any], keep_features: bool
    ):
        protocols = ("floats", "uint8") if cfg.protocol == "both" else (cfg.protocol,)
        self._path = out.with_name(out.name + ".unfinished.npz")
        self._about = json.dumps(about, sort_keys=True)
        self._features = {
            name: out.with_name(f"{out.name}.{name}.unfinished.npy") if keep_features else None
            for name in protocols
        }
        self.keeps_features = keep_features
        self.collected = {}
        self.done = from_primary(lambda: self._open(cfg.num_images, about))
        if not self.collected:  # on the other hosts
            self.collected = {name: Collected.empty(cfg.num_images) for name in protocols}

    def _open(self, images: int, about: dict[str, Any]) -> int:
        """Reads what was saved, or starts; returns how many images are done."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            self.collected = {
                name: Collected.empty(images, file) for name, file in self._features.items()
            }
            return 0
        try:
            with open(self._path, "rb") as content, np.load(content, allow_pickle=False) as file:
                arrays = dict(file)
        except Exception as error:  # NumPy lets pass what zip files raise
            raise EvaluateError(f"cannot read {self._path}: {error}; remove it") from error
        if found := differences(json.loads(str(arrays["about"])), about):
            raise EvaluateError(
                f"{self._path} belongs to another evaluation ({found}): remove it, or choose"
                " another --out"
            )
        for name, file in self._features.items():
            prefix = f"{name}/"
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            self.collected[name] = Collected.from_arrays(own, file)
        return int(arrays["done"])

    def save(self) -> None:
        """Writes what all hosts gathered, whole or not at all; all call it together."""
        self.collected = {name: each.to_first_host() for name, each in self.collected.items()}
        from_primary(self._write)

    def _write(self) -> None:
        arrays: dict[str, Any] = {"about": np.array(self._about), "done": np.array(self.done)}
        for name, each in self.collected.items():
            arrays |= {f"{name}/{key}": value for key, value in each.as_arrays().items()}
        write_arrays(self._path, arrays)

    def remove(self) -> None:
        """Removes the files; the result is there."""
        for path in (self._path, *self._features.values()):
            if path is not None:
                path.unlink(missing_ok=True)
