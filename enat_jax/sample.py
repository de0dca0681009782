"""From a checkpoint to pictures: what `enat_jax.load` returns."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from enat_jax.checkpoint import CheckpointError, Checkpoints
from enat_jax.config import Config, TokenizerConfig, config_from_dict
from enat_jax.errors import UserError
from enat_jax.generate import Layout, TracedStrategy, generate, image_noise, plan_generation
from enat_jax.models.enat import ENAT, ENATConfig
from enat_jax.models.flops import generation_flops, step_flops
from enat_jax.plans import padding
from enat_jax.sharding import batch_sharding, batch_shards, make_mesh, place, replicated
from enat_jax.strategy import make_strategy
from enat_jax.tokenizers.pixels import Pixels

CHECKPOINTS = "checkpoints"  # folder of a workdir
Layers = Literal["auto", "stacked", "unstacked"]


class SampleError(UserError):
    """Something asked of a model that it cannot give; one line."""


def make_tokenizer(cfg: TokenizerConfig, codebook_size: int) -> Pixels | None:
    """The tokenizer a config names, None for `none`."""
    return Pixels(levels=codebook_size, grid=cfg.grid) if cfg.name == "pixels" else None


def abstract_params(cfg: ENATConfig) -> tuple[Any, nnx.State]:
    """The network's structure and the shapes of its parameters, without any memory."""
    return nnx.split(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))), nnx.Param)


class Sampler:
    """A network ready to generate.

    Args:
        config: the experiment's config.
        params: the network's parameters, usually the moving average.
        class_names: names of the classes; their numbers by default.
        mesh: devices to generate on; by default as the config says.
        layers: `unstacked` gives every block arrays of its own, so that no step copies a layer's
            weights out of a stack: 1.5 times faster on CPU, but slower to compile. `auto` does
            so on CPU only.
    """

    def __init__(
        self,
        config: Config,
        params: nnx.State,
        *,
        class_names: Sequence[str] | None = None,
        mesh: Mesh | None = None,
        layers: Layers = "auto",
    ):
        self.config = config
        self.class_names = list(class_names or map(str, range(config.model.num_classes)))
        self.tokenizer = make_tokenizer(config.tokenizer, config.model.codebook_size)
        self.mesh = mesh or make_mesh(config.mesh)
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self._unstacked = layers == "unstacked" or (layers == "auto" and on_cpu)
        graphdef = self.update(params)
        self.generate_batch = jax.jit(
            functools.partial(_generate_batch, graphdef), static_argnames="layout"
        )

    def update(self, params: nnx.State) -> Any:
        """Takes other parameters of the same network; returns the structure they are used in."""
        graphdef, abstract = abstract_params(self.config.model)
        dtype = jnp.dtype(self.config.model.dtype)
        params = jax.tree_util.tree_map_with_path(  # operands are cast once, not at every step
            lambda path, x: x.astype(dtype) if "kernel" in jax.tree_util.keystr(path) else x, params
        )
        params = jax.device_put(params, place(abstract, self.mesh))
        if self._unstacked:
            graphdef, params = nnx.split(nnx.merge(graphdef, params).unstacked(), nnx.Param)
        self.params = params
        return graphdef

    def plan(self, **strategy: Any) -> tuple[Layout, TracedStrategy]:
        """What is compiled and what is traced for the config's strategy with some fields changed.

        Raises:
            SampleError: an unknown field or one out of range.
        """
        cfg = self.config
        try:
            return plan_generation(
                make_strategy(dataclasses.replace(cfg.strategy, **strategy)),
                cfg.model.length,
                lambda plan: step_flops(cfg.model, plan),
                buckets=cfg.sample.buckets or None,
                max_padding=cfg.sample.max_padding,
            )
        except (TypeError, ValueError) as error:
            raise SampleError(str(error)) from error

    def describe(self, **strategy: Any) -> str:
        """One line on the plan: steps, buckets, FLOPs per image and what padding adds to them."""
        layout, _ = self.plan(**strategy)
        exact, padded = (
            generation_flops(self.config.model, layout.buckets, padded=padded)
            for padded in (False, True)
        )
        extra = padding(layout.buckets, lambda plan: step_flops(self.config.model, plan))
        return (
            f"{layout.steps} steps in {len(layout.buckets)} compiled bodies,"
            f" {padded / 1e9:.4g} GFLOP per image"
            f" ({exact / 1e9:.4g} without padding, which adds {100 * extra:.1f}%)"
        )

    def token_batches(
        self, class_ids: Sequence[int] | np.ndarray, *, seed: int = 0, **strategy: Any
    ) -> Iterator[Int[np.ndarray, "b n"]]:
        """Generates token ids, batch by batch; image i depends on seed, i and its class alone.

        Args:
            class_ids: one class per image, in [0, num_classes].
            seed: of the noise.
            strategy: fields of the config's strategy to change, such as `steps`.

        Raises:
            SampleError: no images, a class id out of range, or a strategy that cannot be.
        """
        classes = self._checked(class_ids)
        layout, traced = self.plan(**strategy)
        shards = batch_shards(self.mesh)
        size = min(self.config.sample.batch_size, len(classes))
        size = -(-size // shards) * shards
        by_image, whole = batch_sharding(self.mesh), replicated(self.mesh)
        traced, key = jax.device_put((traced, jax.random.key(seed)), whole)
        for start in range(0, len(classes), size):
            ids = np.arange(start, start + size)
            batch = classes[np.minimum(ids, len(classes) - 1)]  # the last one is filled up
            tokens = self.generate_batch(
                self.params,
                jax.device_put(jnp.asarray(batch), by_image),
                jax.device_put(jnp.asarray(ids, jnp.int32), by_image),
                traced,
                key,
                layout=layout,
            )
            yield np.asarray(tokens)[: len(classes) - start]

    def sample(
        self,
        class_ids: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
        **strategy: Any,
    ) -> UInt8[np.ndarray, "b y x 3"]:
        """Generates images; image i depends on seed, i and its class alone.

        Args:
            class_ids: one class per image, in [0, num_classes]; num_classes is "any class".
            seed: of the noise.
            progress: called with the number of images of each finished batch.
            strategy: fields of the config's strategy to change, such as `steps`.

        Raises:
            SampleError: see `token_batches`; or the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise SampleError("tokenizer.name is 'none': this model gives token ids, not images")
        images = []
        for tokens in self.token_batches(class_ids, seed=seed, **strategy):
            images.append(np.asarray(self.tokenizer.decode(tokens)))
            if progress is not None:
                progress(len(tokens))
        return np.concatenate(images)

    def _checked(self, class_ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " b"]:
        classes = np.asarray(class_ids)
        limit = self.config.model.num_classes
        if classes.ndim != 1 or not classes.size or not np.issubdtype(classes.dtype, np.integer):
            raise SampleError(f"class_ids must be a list of whole numbers, not {class_ids!r}")
        wrong = sorted({int(c) for c in classes if not 0 <= c <= limit})
        if wrong:
            raise SampleError(
                f"class ids {wrong} are out of range: 0 to {limit - 1}, or {limit} for any class"
            )
        return classes.astype(np.int32)


def _generate_batch(
    graphdef: Any,
    params: nnx.State,
    class_ids: Int[Array, " b"],
    image_ids: Int[Array, " b"],
    strategy: TracedStrategy,
    key: jax.Array,
    layout: Layout,
) -> Int[Array, "b l"]:
    model = nnx.merge(graphdef, params)
    noise = image_noise(key, image_ids, model.cfg.codebook_size)
    token_ids, _ = generate(
        model, class_ids, strategy, noise, layout=layout, null_class_id=model.cfg.null_class_id
    )
    return token_ids


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    overrides: Callable[[dict[str, Any]], Config] = config_from_dict,
    warn: Callable[[str], object] = print,
    **options: Any,
) -> Sampler:
    """Loads a run's moving average.

    Args:
        path: a workdir, or the checkpoints folder in it.
        step: which checkpoint; the newest readable one by default.
        overrides: turns the stored config's fields into the config to use.
        warn: called with one line per damaged checkpoint passed over.
        options: `mesh` and `layers` of `Sampler`.

    Raises:
        CheckpointError: no readable checkpoint there, or one of another model.
    """
    folder = pathlib.Path(path)
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    checkpoints = Checkpoints(folder, read_only=True)
    metadata = checkpoints.metadata(step)
    if "config" not in metadata:
        raise CheckpointError(f"{folder} holds no checkpoint of this project")
    config = overrides(metadata["config"])
    mesh = options.pop("mesh", None) or make_mesh(config.mesh)
    _, abstract = abstract_params(config.model)
    target = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        place(abstract, mesh),
    )
    found = checkpoints.restore({"ema": target}, step=step, warn=warn)
    assert found is not None  # its metadata were there
    class_names = metadata.get("class_names")
    return Sampler(config, found[1]["ema"], class_names=class_names, mesh=mesh, **options)
