"""From images to token records, batch by batch on all devices."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import multihost_utils
from jaxtyping import Array, Int32, UInt8, UInt16
from tqdm import tqdm

from enat_jax.data.image_source import ImageConfig, open_images
from enat_jax.data.prepared import SHIPPED
from enat_jax.data.read_ahead import ImageBatch, read_batches
from enat_jax.data.record_plan import RecordPlan
from enat_jax.data.records import RecordFolder
from enat_jax.errors import UserError
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.protocol import Tokenizer

_SECONDS = 30  # between lines on progress where there is no terminal
_WHITE = 255


class TokenizeError(UserError):
    """Images that cannot be made into records as asked."""


def tokenize(
    images: ImageConfig,
    tokenizer: Tokenizer,
    out_name: str,
    data_dir: str | os.PathLike[str],
    *,
    grid: tuple[int, int],
    batch_size: int,
    placement: Placement,
    say: Callable[[str], object] = print,
) -> None:
    """Writes the token records of all images, or those that an earlier run did not get to.

    Several processes share the work shard by shard, each on its own devices, without waiting for
    each other before the end. Batches all have one shape, never reach into another shard, and
    keep a blank image's place for one that is unreadable: so an image meets the same program at
    the same place of a batch whatever was done before, and its tokens are the same whether the
    run was interrupted or not. With another `batch_size` or other devices they can differ where
    two codes are equally near but for rounding.

    Args:
        images: Which images.
        tokenizer: What makes tokens of them.
        out_name: TFDS name of the records.
        data_dir: Folder of the prepared data sets; one that all processes share.
        grid: Rows and columns of tokens, equally many.
        batch_size: Images read per batch and process; as many again are made by mirroring.
        placement: Of the devices; batches are split over this process's own.
        say: Called with lines for the user.

    Raises:
        UserError: arguments that do not fit, images or records that cannot be opened, more
            unreadable images than allowed; whole shards are kept.
    """
    placement = placement.local
    _check(tokenizer, out_name, grid, batch_size, placement)
    source = open_images(images)
    plan = RecordPlan(
        name=out_name,
        tokenizer=tokenizer.name,
        tokenizer_digest=tokenizer.digest,
        codebook_size=tokenizer.codebook_size,
        grid=grid,
        image_size=grid[0] * tokenizer.patch,
        flips=images.flips,
        source=source.name,
        source_digest=source.digest,
        num_images=len(source),
        class_names=source.class_names,
        shard_size=images.shard_size,
    )
    folder = RecordFolder(plan, data_dir)
    if folder.finished:
        say(f"{folder.path} is whole already: {folder.num_skipped()} images were skipped")
        return
    missing = folder.missing()
    mine = [s for s in missing if s % jax.process_count() == jax.process_index()]
    begun = f"; {plan.num_shards - len(missing)} of {plan.num_shards} shards are there"
    say(
        f"{source.summary}, to {grid[0]} x {grid[1]} tokens of {tokenizer.name} in {folder.path}"
        f"{begun if len(missing) < plan.num_shards else ''}"
    )
    started = time.perf_counter()
    spans = [span for shard in mine for span in _spans(plan.images_of(shard), batch_size)]
    encode = compiled_encoder(tokenizer, plan, batch_size, placement)
    with contextlib.closing(
        read_batches(
            source,
            spans,
            batch_size=batch_size,
            size=plan.image_size,
            threads=images.read_threads,
        )
    ) as batches:
        _write_shards(folder, _one_behind(encode, batches), mine, images.max_unreadable, say)
    seconds = time.perf_counter() - started

    multihost_utils.sync_global_devices(f"{out_name}: all shards are there")
    if jax.process_index() == 0:
        skipped = folder.num_skipped()
        _stop_if_too_many(skipped, plan, images.max_unreadable)
        records = folder.finish()
        rate = f"; {sum(map(len, spans)) / seconds:.1f} images/s" if spans else ""
        say(
            f"{plan.num_images} images, {skipped} skipped, {records} records in {folder.path}{rate}"
        )
    multihost_utils.sync_global_devices(f"{out_name}: described")


def compiled_encoder(
    tokenizer: Tokenizer, plan: RecordPlan, batch_size: int, placement: Placement
) -> Callable[[UInt8[np.ndarray, "b y x 3"]], Int32[Array, "b o n"]]:
    """Encodes batches of one size in each orientation `o`: as they are and, if asked, mirrored."""

    def encode(weights: Any, images: UInt8[Array, "b y x 3"]) -> Int32[Array, "b o n"]:
        pixels = images.astype(jnp.float32) / _WHITE
        both = jnp.stack([pixels, pixels[:, :, ::-1]] if plan.flips else [pixels], axis=1)
        token_ids = tokenizer.encode(weights, rearrange(both, "b o y x c -> (b o) y x c"))
        return rearrange(token_ids, "(b o) n -> b o n", b=batch_size)

    weights = jax.device_put(tokenizer.params, placement.replicated)
    by_rows = placement.batch
    compiled = jax.jit(encode, in_shardings=(placement.replicated, by_rows), out_shardings=by_rows)
    return lambda images: compiled(weights, jax.device_put(images, by_rows))


def _check(
    tokenizer: Tokenizer,
    out_name: str,
    grid: tuple[int, int],
    batch_size: int,
    placement: Placement,
) -> None:
    """All that is wrong with the arguments in one error."""
    errors = []
    if out_name in SHIPPED:
        errors.append(f"out_name = {out_name!r} is a data set of the project's own")
    if grid[0] != grid[1] or grid[0] < 1:
        errors.append(f"grid = {grid[0]} x {grid[1]}, must be square: crops are")
    shards = placement.batch_shards
    if batch_size < 1 or batch_size % shards:
        errors.append(f"batch_size = {batch_size}, must be a multiple of {shards} devices")
    if errors:
        raise TokenizeError(f"tokenize with {tokenizer.name}: {'; '.join(errors)}")


def _spans(images: range, batch_size: int) -> list[range]:
    return [images[start : start + batch_size] for start in range(0, len(images), batch_size)]


def _one_behind(
    encode: Callable[[np.ndarray], Array], batches: Iterable[ImageBatch]
) -> Iterator[tuple[ImageBatch, Int32[np.ndarray, "b o n"]]]:
    """Batches with their token ids, waited for while the devices work on the next batch."""
    previous: tuple[ImageBatch, Array] | None = None
    for batch in batches:
        token_ids = encode(batch.images)
        if previous is not None:
            yield previous[0], np.asarray(previous[1])
        previous = batch, token_ids
    if previous is not None:
        yield previous[0], np.asarray(previous[1])


def _write_shards(
    folder: RecordFolder,
    encoded: Iterable[tuple[ImageBatch, Int32[np.ndarray, "b o n"]]],
    shards: Sequence[int],
    max_unreadable: float,
    say: Callable[[str], object],
) -> None:
    """Gathers batches into shards and writes them, with a bar or lines on how far it is."""
    plan, skipped = folder.plan, folder.num_skipped()
    _stop_if_too_many(skipped, plan, max_unreadable)
    total, done = sum(len(plan.images_of(shard)) for shard in shards), 0
    rows: list[tuple[np.ndarray, np.ndarray]] = []  # of the shard at work: token ids, labels
    reasons: dict[str, str] = {}
    started = said = time.perf_counter()
    with tqdm(total=total, unit="image", disable=None, dynamic_ncols=True) as bar:
        for batch, token_ids in encoded:
            for error in batch.unreadable:
                with bar.external_write_mode():
                    say(f"skipped {error}")
                reasons[error.name] = error.reason
            skipped += len(batch.unreadable)
            _stop_if_too_many(skipped, plan, max_unreadable)
            rows.append((_checked(token_ids[batch.readable], plan), batch.labels[batch.readable]))
            shard = batch.span.start // plan.shard_size
            if batch.span.stop == plan.images_of(shard).stop:
                token_ids, labels = (np.concatenate(each) for each in zip(*rows, strict=True))
                _write_shard(folder, shard, token_ids, labels, reasons)
                rows, reasons = [], {}
            bar.update(len(batch.span))
            done += len(batch.span)
            now = time.perf_counter()
            if bar.disable and now - said >= _SECONDS and done < total:
                rate, said = done / (now - started), now
                left = (total - done) / rate / 60
                say(f"{done}/{total} images, {rate:.1f} images/s, {left:.1f} min left")


def _write_shard(
    folder: RecordFolder,
    shard: int,
    token_ids: UInt16[np.ndarray, "b o n"],
    labels: Int32[np.ndarray, " b"],
    reasons: dict[str, str],
) -> None:
    """Writes a shard: image by image, each mirror image after its original."""
    images, orientations, _ = token_ids.shape
    folder.write(
        shard,
        rearrange(token_ids, "b o n -> (b o) n"),
        np.repeat(labels, orientations),
        np.tile(np.arange(orientations) > 0, images),
        reasons,
    )


def _checked(
    token_ids: Int32[np.ndarray, "b o n"], plan: RecordPlan
) -> UInt16[np.ndarray, "b o n"]:
    expected = (1 + plan.flips, plan.grid[0] * plan.grid[1])
    if token_ids.shape[1:] != expected:
        raise TokenizeError(
            f"{plan.tokenizer} gave {token_ids.shape[2]} tokens, the grid has {expected[1]}"
        )
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < plan.codebook_size:
        raise TokenizeError(
            f"{plan.tokenizer} gave token ids in [{token_ids.min()}, {token_ids.max()}], must lie"
            f" in [0, {plan.codebook_size})"
        )
    return token_ids.astype(np.uint16)


def _stop_if_too_many(skipped: int, plan: RecordPlan, max_unreadable: float) -> None:
    """Stops where more images are unreadable than allowed, out of all there are."""
    if skipped > max_unreadable * plan.num_images:
        raise TokenizeError(
            f"{skipped} of {plan.num_images} images are unreadable so far, more than"
            f" max_unreadable = {max_unreadable} allows; what was written is kept, and the same"
            " command goes on"
        )
