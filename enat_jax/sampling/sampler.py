"""From a checkpoint to pictures: what `enat_jax.load` returns."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree, UInt8

from enat_jax.checkpoints.caption_reader import CaptionReader, load_caption_reader
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS, load_tokenizer
from enat_jax.config import MAY_DIFFER, Config, config_from_dict
from enat_jax.core.generate import Layout, TracedStrategy
from enat_jax.errors import UserError, differences
from enat_jax.models.flops import generation_flops, padding
from enat_jax.models.networks import abstract_params
from enat_jax.parallel.hosts import all_gather
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram, Layers, Output
from enat_jax.tokenizers.protocol import Tokenizer


class Sampler:
    """A network ready to generate.

    Args:
        config: the experiment's config.
        params: the network's parameters, usually the moving average.
        class_names: names of the classes; their numbers by default.
        tokenizer: turns token ids into images; loaded as the config says by default.
        placement: of the devices to generate on, of any number of processes; by default as the
            config says. All processes then make a sampler of the same things, and ask it for the
            same images together.
        layers: as `GenerationProgram`'s.
        reader: of the captions, for a network that is given those.
    """

    def __init__(
        self,
        config: Config,
        params: nnx.State,
        *,
        class_names: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        reader: CaptionReader | None = None,
        placement: Placement | None = None,
        layers: Layers = "auto",
    ):
        self.config, self.reader = config, reader
        self.class_names = list(class_names or map(str, range(config.model.num_classes)))
        self.placement = placement or Placement.of(config.mesh)
        self.tokenizer = tokenizer or load_tokenizer(
            config.tokenizer, config.model.codebook_size, self.placement
        )
        self.program = GenerationProgram(config, self.placement, self.tokenizer, layers=layers)
        self.update(params)

    def update(self, params: nnx.State) -> None:
        """Takes other parameters of the same network: of this host, or on the mesh already."""
        self.params = self.program.prepare(params)

    def describe(self, **strategy: Any) -> str:
        """One line on the plan: steps, buckets, FLOPs per image and what padding adds to them."""
        layout, model = self.program.plan(**strategy)[0], self.config.model
        flops = generation_flops(model, layout.buckets, padded=True)
        extra = padding(model, layout.buckets)
        return (
            f"{layout.steps} steps in {len(layout.buckets)} compiled bodies,"
            f" {flops / 1e9:.4g} GFLOP per image"
            f" ({flops / (1 + extra) / 1e9:.4g} without padding, which adds {100 * extra:.1f}%)"
        )

    def batches(
        self,
        class_ids: Sequence[int] | np.ndarray = (),
        *,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        output: Output,
        seed: int = 0,
        first: int = 0,
        plan: tuple[Layout, TracedStrategy] | None = None,
        run: Callable[..., Any] | None = None,
        batch_size: int | None = None,
        **strategy: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Generates on the devices, batch by batch; image i depends on seed, i and its class alone.

        Or on its prompt, where the network is given captions.

        Args:
            class_ids: one class per image, in [0, num_classes]; num_classes is "any class".
            prompts: one caption per image instead.
            negative_prompt: what guidance leads away from, in place of the empty caption.
            output: token ids `[b n]`, images in [0, 1] as they come from the decoder
                `[b y x 3]`, or those rounded to 256 levels.
            seed: of the noise.
            first: index of the first image to make; those before it were made already.
            plan: what is compiled and traced, from `program.plan`; by default as `strategy` says.
            run: makes a batch in place of `program.run`, of the same arguments.
            batch_size: images in a call; by default as `program.batch_size` says of so many.
            strategy: fields of the config's strategy to change, such as `steps`.

        Yields:
            The number of images that count, and the batch: all batches are of one size, the last
            filled up.

        Raises:
            UserError: no images, a class id out of range, classes asked of a model of captions or
                the other way round, a model of captions without their reader, a strategy that
                cannot be, or images asked of a model without a tokenizer.
        """
        decoder, placement = self.program.decoder(output), self.placement
        given, condition = self._asked(class_ids, prompts, negative_prompt)
        layout, traced = plan or self.program.plan(**strategy)
        size = batch_size or self.program.batch_size(len(given))
        traced, key = placement.put((traced, jax.random.key(seed)))
        run = run or self.program.run
        for start in range(first, len(given), size):
            ids = np.arange(start, start + size, dtype=np.int32)
            batch = given[np.minimum(ids, len(given) - 1)]  # the last one is filled up
            batch, ids = placement.put((batch, ids), placement.batch)
            arguments = (self.params, decoder, condition(batch), ids, traced, key)
            yield min(size, len(given) - start), run(*arguments, layout=layout, output=output)

    def token_batches(
        self, class_ids: Sequence[int] | np.ndarray = (), *, seed: int = 0, **strategy: Any
    ) -> Iterator[Int[np.ndarray, "b n"]]:
        """Generates token ids, batch by batch, on every host; arguments as in `batches`."""
        for count, tokens in self.batches(class_ids, output="token_ids", seed=seed, **strategy):
            yield all_gather(tokens)[:count]

    def image_batches(
        self, class_ids: Sequence[int] | np.ndarray = (), *, seed: int = 0, **strategy: Any
    ) -> Iterator[UInt8[np.ndarray, "b y x 3"]]:
        """Generates images, batch by batch, on every host; arguments as in `batches`."""
        for count, images in self.batches(class_ids, output="uint8", seed=seed, **strategy):
            yield all_gather(images)[:count]

    def sample(
        self, class_ids: Sequence[int] | np.ndarray = (), *, seed: int = 0, **strategy: Any
    ) -> UInt8[np.ndarray, "b y x 3"]:
        """Generates images, all on every host; arguments and errors as in `batches`."""
        return np.concatenate(list(self.image_batches(class_ids, seed=seed, **strategy)))

    def _asked(
        self, class_ids: Sequence[int] | np.ndarray, prompts: Sequence[str], negative_prompt: str
    ) -> tuple[Int[np.ndarray, "b ..."], Callable[[Array], PyTree]]:
        """Numbers for each image, and what makes a batch's condition of some of them."""
        if self.reader is None:
            if self.config.model.condition == "text":
                raise UserError(
                    f"text.name = {self.config.text.name!r} is not what this model reads captions"
                    " with: give --config.text.name, and --config.text.weights for 'clip'"
                )
            if len(prompts) or negative_prompt:
                raise UserError("this model makes images of classes: it reads no prompts")
            return self._checked(class_ids), lambda batch: batch
        if len(class_ids):
            raise UserError("this model makes images of captions: give prompts, not classes")
        if not len(prompts):
            raise UserError("this model makes images of captions: give at least one prompt")
        reader, (empty,) = self.reader, self.reader.ids([negative_prompt])
        return reader.ids(prompts), lambda batch: reader.condition(batch, empty)

    def _checked(self, class_ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " b"]:
        classes = np.asarray(class_ids)
        limit = self.config.model.num_classes
        if classes.ndim != 1 or not classes.size or not np.issubdtype(classes.dtype, np.integer):
            raise UserError(f"class_ids must be a list of whole numbers, not {class_ids!r}")
        wrong = sorted({int(c) for c in classes if not 0 <= c <= limit})
        if wrong:
            raise UserError(
                f"class ids {wrong} are out of range: 0 to {limit - 1}, or {limit} for any class"
            )
        return classes.astype(np.int32)


class Restored(NamedTuple):
    """What a checkpoint holds for sampling."""

    config: Config
    ema: nnx.State
    step: int
    class_names: Sequence[str] | None
    tokenizer_digest: str
    text: Mapping[str, Any] | None = None


def restore(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    overrides: Callable[[dict[str, Any]], Config] = config_from_dict,
    mesh: Mesh | None = None,
    warn: Callable[[str], object] = print,
) -> Restored:
    """Reads a run's moving average; arguments and errors as in `load`."""
    folder = pathlib.Path(path)
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    checkpoints = Checkpoints(folder, read_only=True)
    metadata = checkpoints.metadata(step)
    if "config" not in metadata or {"vqgan", "patches"} & set(metadata):
        raise CheckpointError(f"{folder} holds no checkpoint of an image generator")
    # where it was trained does not say where it is used: the default mesh, unless overridden
    config = overrides({**metadata["config"], "mesh": {}})
    _refuse_another_network(metadata["config"], config, folder)
    placement = Placement(mesh, config.mesh.placement) if mesh else Placement.of(config.mesh)
    target = placement.params(abstract_params(config.model)[1])
    found = checkpoints.restore({"ema": target}, step=step, warn=warn)
    assert found is not None  # its metadata were there
    return Restored(
        config=config,
        ema=found[1]["ema"],
        step=found[0],
        class_names=metadata.get("class_names"),
        tokenizer_digest=metadata.get("tokenizer_digest", ""),
        text=metadata.get("text"),
    )


def _refuse_another_network(saved: dict[str, Any], config: Config, folder: pathlib.Path) -> None:
    """Refuses overrides that make another network, be it one of the same shapes."""
    sections, own = ("model", "tokenizer"), config_from_dict({**saved, "mesh": {}})
    here, there = (
        {s: {k: v for k, v in dataclasses.asdict(getattr(each, s)).items() if k not in MAY_DIFFER}
         for s in sections}
        for each in (config, own)
    )  # fmt: skip
    if "none" in (config.tokenizer.name, own.tokenizer.name):  # token ids alone; converted weights
        here["tokenizer"]["name"] = there["tokenizer"]["name"]
    if phrases := differences(json.loads(json.dumps(there)), here):
        raise CheckpointError(f"{folder} is of another model: {phrases}")


def sampler_of(restored: Restored, *, mesh: Mesh | None = None, layers: Layers = "auto") -> Sampler:
    """A sampler of what `restore` read; arguments as in `load`.

    Raises:
        CheckpointError: the tokenizer is not the one whose tokens the model was trained on.
    """
    config, trained_on = restored.config, restored.tokenizer_digest
    placement = Placement(mesh, config.mesh.placement) if mesh else Placement.of(config.mesh)
    sampler = Sampler(
        config,
        restored.ema,
        class_names=restored.class_names,
        placement=placement,
        layers=layers,
        reader=load_caption_reader(config.text, restored.text, placement),
    )
    if sampler.tokenizer is not None and trained_on not in ("", sampler.tokenizer.digest):
        raise CheckpointError(
            f"tokenizer.weights = {config.tokenizer.weights!r} has digest"
            f" {sampler.tokenizer.digest[:12]}, the model was trained on tokens of"
            f" {trained_on[:12]}"
        )
    return sampler


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    overrides: Callable[[dict[str, Any]], Config] = config_from_dict,
    warn: Callable[[str], object] = print,
    mesh: Mesh | None = None,
    layers: Layers = "auto",
) -> Sampler:
    """Loads a run's moving average.

    Args:
        path: a workdir, or the checkpoints folder in it.
        step: which checkpoint; the newest readable one by default.
        overrides: turns the stored config's fields into the config to use.
        warn: called with one line per damaged checkpoint passed over.
        mesh: devices to generate on, of any number of processes; all that there are by default.
        layers: as `Sampler`'s.

    Raises:
        CheckpointError: no readable checkpoint there, or one of another model, or the tokenizer
            is not the one whose tokens the model was trained on, or overrides that make another
            network.
    """
    restored = restore(path, step=step, overrides=overrides, mesh=mesh, warn=warn)
    return sampler_of(restored, mesh=mesh, layers=layers)
