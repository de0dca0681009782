"""From images to token records, batch by batch on all devices."""

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int32, PyTree, UInt8
from tqdm import tqdm

from enat_jax.config import Config
from enat_jax.data.image_batches import read_batches
from enat_jax.data.images import ImageConfig, ImageSource, open_images
from enat_jax.data.prepared import shipped
from enat_jax.data.records import RecordFolder, RecordPlan
from enat_jax.errors import UserError
from enat_jax.parallel.hosts import all_gather_text, from_primary
from enat_jax.parallel.placement import Placement
from enat_jax.text.protocol import TextEncoder, TextTokenizer
from enat_jax.text.words import Words, words_of
from enat_jax.tokenizers.protocol import Tokenizer

T = TypeVar("T")

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def tokenize(
    config: Config,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    placement: Placement,
    text: TextTokenizer | None = None,
    encoder: TextEncoder | None = None,
    log: Callable[[str], object] = print,
) -> None:
    """Writes the records `data` of all `images`, or those that an earlier run did not get to.

    Several processes share the work shard by shard, each on its own devices, without waiting for
    each other before the end. Batches all have one shape, never reach into another shard, and
    keep a blank image's place for one that is unreadable: so an image meets the same program at
    the same place of a batch whatever was done before, and its tokens are the same whether the
    run was interrupted or not. With another `batch_size` or other devices they can differ where
    two codes are equally near but for rounding.

    Captions are tokenized, too, where `config.text` says by what. A mirror image has the captions
    of its original.

    Args:
        config: of its sections `images`, `data`, `tokenizer` and `text`; all processes share
            `data_dir`.
        tokenizer: the config's, loaded.
        batch_size: images read per batch and process, equally many on each of its devices; as
            many again are made by mirroring.
        placement: of this process's own devices, over which batches are split.
        text: `config.text`'s tokenizer, loaded; None for `words`, which are those of all captions,
            and for `none`.
        encoder: `config.text`'s, whose digest the records name; None where there is none.
        log: called with lines for the user.

    Raises:
        UserError: arguments that do not fit, images or records that cannot be opened, more
            unreadable images than allowed; complete shards are kept.
    """
    images, data, grid = config.images, config.data, config.tokenizer.grid
    if shipped(data.name):
        raise UserError(f"data.name = {data.name!r} is a data set of the project's own")
    if grid[0] != grid[1]:
        raise UserError(f"tokenizer.grid = {grid[0]} x {grid[1]}, must be square: crops are")
    source = open_images(images)
    reader, lacking = config.text.name, "classes" if source.captions else "captions"
    if not (source.class_names if reader == "none" else source.captions):
        raise UserError(f"text.name = {reader!r} does not fit {source.name}, without {lacking}")
    if reader == "words":
        text = _words(source, config.text.length, log)
    flips, about_flips = _flips(source, text is not None, images)
    plan = RecordPlan(
        name=data.name,
        tokenizer=tokenizer.name,
        tokenizer_digest=tokenizer.digest,
        codebook_size=tokenizer.codebook_size,
        grid=grid,
        image_size=grid[0] * tokenizer.patch,
        flips=flips,
        source=source.name,
        source_digest=source.digest,
        num_images=len(source),
        class_names=() if text else source.class_names,
        shard_size=images.shard_size,
        text=_described(text, encoder) if text else None,
    )
    folder = RecordFolder(plan, data.data_dir)
    if folder.finished:
        log(f"{folder.path} is complete already: {folder.num_skipped()} images were skipped")
        return
    missing = folder.missing()
    begun = f"; {plan.num_shards - len(missing)} of {plan.num_shards} shards are there"
    log(
        f"{source.summary}, to {grid[0]} x {grid[1]} tokens of {tokenizer.name} in {folder.path}"
        f"{begun if len(missing) < plan.num_shards else ''}"
    )
    if about_flips:
        log(about_flips)
    own = [shard for shard in missing if shard % jax.process_count() == jax.process_index()]
    started = time.perf_counter()
    encode = compiled_encoder(tokenizer, flips, placement)
    count = _write_shards(folder, own, source, encode, text, images, batch_size, log)
    rate = f"; {count / (time.perf_counter() - started):.1f} images/s" if count else ""

    def finish() -> int:
        _refuse_too_many(folder.num_skipped(), plan, images)
        return folder.finish()

    all_gather_text("")  # all shards are there
    records = from_primary(finish)
    log(
        f"{plan.num_images} images, {folder.num_skipped()} skipped, {records} records in"
        f" {folder.path}{rate}"
    )


def compiled_encoder(
    tokenizer: Tokenizer, flips: bool, placement: Placement
) -> Callable[[UInt8[np.ndarray, "b y x 3"]], Int32[Array, "b o n"]]:
    """Encodes batches of one size in each orientation `o`: as they are and, if asked, mirrored."""

    def encode(weights: PyTree, images: UInt8[Array, "b y x 3"]) -> Int32[Array, "b o n"]:
        pixels = images.astype(jnp.float32) / 255
        both = jnp.stack([pixels, pixels[:, :, ::-1]] if flips else [pixels], axis=1)
        token_ids = tokenizer.encode(weights, rearrange(both, "b o y x c -> (b o) y x c"))
        return rearrange(token_ids, "(b o) n -> b o n", b=len(images))

    weights = placement.put(tokenizer.params)
    by_rows = placement.batch
    compiled = jax.jit(encode, in_shardings=(placement.replicated, by_rows), out_shardings=by_rows)
    return lambda images: compiled(weights, jax.device_put(images, by_rows))


def _write_shards(
    folder: RecordFolder,
    shards: Sequence[int],
    source: ImageSource,
    encode: Callable[[np.ndarray], Array],
    text: TextTokenizer | None,
    cfg: ImageConfig,
    batch_size: int,
    log: Callable[[str], object],
) -> int:
    """Writes shards image by image, each mirror image after its original; returns how many."""
    plan, skipped = folder.plan, folder.num_skipped()
    _refuse_too_many(skipped, plan, cfg)
    spans = [
        images[start : start + batch_size]
        for images in map(plan.images_of, shards)
        for start in range(0, len(images), batch_size)
    ]
    size, threads = plan.image_size, cfg.read_threads
    batches = read_batches(source, spans, batch_size=batch_size, size=size, threads=threads)
    encoded = _one_behind((batch, encode(batch.images)) for batch in batches)
    by_shard = itertools.groupby(encoded, lambda each: each[0].span.start // plan.shard_size)
    with tqdm(
        total=sum(map(len, spans)),
        unit="image",
        disable=jax.process_index() > 0,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    ) as bar:
        for shard, parts in by_shard:
            tokens, labels, numbers, reasons = [], [], [], {}
            for batch, token_ids in parts:
                for error in batch.unreadable:
                    with bar.external_write_mode():
                        log(f"skipped {error}")
                    reasons[error.name] = error.reason
                skipped += len(batch.unreadable)
                _refuse_too_many(skipped, plan, cfg)
                tokens.append(np.asarray(token_ids)[batch.readable])
                labels.append(batch.labels[batch.readable])
                numbers += itertools.compress(batch.span, batch.readable)
                bar.update(len(batch.span))
            token_ids = np.concatenate(tokens).astype(np.uint16)
            images, orientations, _ = token_ids.shape
            of_images = (
                _captions(source, numbers, text) if text else {"label": np.concatenate(labels)}
            )
            columns: dict[str, Any] = {
                name: [value for value in each for _ in range(orientations)]
                for name, each in of_images.items()
            }
            columns["tokens"] = rearrange(token_ids, "b o n -> (b o) n")
            columns["flipped"] = np.tile(np.arange(orientations) > 0, images)
            folder.write(shard, columns, reasons)
    return sum(map(len, spans))


def _words(source: ImageSource, length: int, log: Callable[[str], object]) -> Words:
    """The words of all captions of all images."""
    captions = (each for number in range(len(source)) for each in _captions_of(source, number))
    words = words_of(captions, length, warn=log)
    log(f"{len(words.words)} different words in all captions, {words.length} read of one at most")
    return words


def _described(text: TextTokenizer, encoder: TextEncoder | None) -> dict[str, Any]:
    """What turns captions into ids, and what is to read these, as records say it."""
    names = ("name", "digest", "length", "vocabulary")
    described = {name: getattr(text, name) for name in names}
    if isinstance(text, Words):
        described["words"] = list(text.words)
    if encoder is not None:
        described["encoder_digest"] = encoder.digest
    return described


def _flips(source: ImageSource, captioned: bool, cfg: ImageConfig) -> tuple[bool, str]:
    """Whether mirror images are recorded, and what is to be said of it."""
    if not captioned:
        return bool(cfg.flips), ""
    captions = (_captions_of(source, number) for number in range(len(source)))
    sides = sum(any(map(_SIDES.search, each)) for each in captions)
    said = f"{sides} of {len(source)} images have a caption with the word left or right"
    if cfg.flips == "auto" and sides:
        return False, f"{said}: no mirror images, images.flips=True makes them nevertheless"
    return bool(cfg.flips), f"mirror images have their originals' captions; {said}" * bool(
        cfg.flips
    )


def _captions(source: ImageSource, numbers: Sequence[int], text: TextTokenizer) -> dict[str, Any]:
    """All captions of some images, and their ids: `[k t]` of each image."""
    captions = [_captions_of(source, number) for number in numbers]
    ids = text(list(itertools.chain.from_iterable(captions)))
    ends = np.cumsum([len(each) for each in captions], dtype=int)
    return {"captions": captions, "caption_ids": np.split(ids, ends)[:-1]}


def _captions_of(source: ImageSource, number: int) -> tuple[str, ...]:
    """The captions of an image, at least one."""
    captions = source.captions(number) if source.captions else ()
    if not captions:
        raise UserError(f"{source.describe(number)} has no caption")
    return captions


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """The same items, each once the next is made: it is waited for while devices work on that."""
    made: list[T] = []
    for item in items:
        yield from made
        made = [item]
    yield from made


def _refuse_too_many(skipped: int, plan: RecordPlan, cfg: ImageConfig) -> None:
    """Stops where more images are unreadable than allowed, out of all there are."""
    if skipped > cfg.max_unreadable * plan.num_images:
        raise UserError(
            f"{skipped} of {plan.num_images} images are unreadable so far, more than"
            f" max_unreadable = {cfg.max_unreadable} allows; what was written is kept, and the same"
            " command goes on"
        )
