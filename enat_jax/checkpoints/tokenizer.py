"""The tokenizer that a config names, with its weights, ready for use inside a compiled program."""

import dataclasses
import os
import pathlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.config import TokenizerConfig
from enat_jax.config_file import ConfigError, make_config
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.pixels import Pixels
from enat_jax.tokenizers.protocol import Tokenizer
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig

CHECKPOINTS = "checkpoints"  # folder of a workdir
WHITE = 255


@dataclass(frozen=True)
class PixelTokenizer:
    """`Pixels` behind the interface of all tokenizers; colours become greys."""

    codebook_size: int
    name: str = "pixels"
    patch: int = 1
    digest: str = ""
    params: Any = ()

    def encode(self, params: Any, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """The greys nearest to the pixels' mean colour."""
        greys = jnp.rint(images.mean(axis=-1, keepdims=True) * WHITE).astype(jnp.uint8)
        _, y, x, _ = greys.shape
        return Pixels(self.codebook_size, (y, x)).encode(greys)

    def decode(
        self, params: Any, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Grey images in [0, 1]."""
        return Pixels(self.codebook_size, grid).decode(token_ids) / jnp.float32(WHITE)


@dataclass(frozen=True)
class VQGANTokenizer:
    """A VQGAN and its weights behind the interface of all tokenizers."""

    cfg: VQGANConfig
    params: nnx.State = field(repr=False)
    digest: str
    name: str = "vqgan"

    @property
    def codebook_size(self) -> int:
        """Number of codebook entries."""
        return self.cfg.codebook_size

    @property
    def patch(self) -> int:
        """Pixels along each side of a token."""
        return self.cfg.patch

    def _model(self, params: nnx.State) -> VQGAN:
        return nnx.merge(abstract_vqgan(self.cfg)[0], params)

    def encode(self, params: nnx.State, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """Token ids of images in [0, 1]."""
        return self._model(params).encode(images)

    def decode(
        self, params: nnx.State, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Images, clipped to [0, 1]."""
        return jnp.clip(self._model(params).decode(token_ids, grid), 0.0, 1.0)


def load_tokenizer(
    cfg: TokenizerConfig, codebook_size: int, placement: Placement | None = None
) -> Tokenizer | None:
    """The tokenizer a config names, None for `none`.

    Args:
        cfg: the config's section.
        codebook_size: of the network that is to use it; 0 takes the tokenizer's.
        placement: on whose devices the weights are to be replicated; the first device by default.

    Raises:
        UserError: no weights where the config says, or ones of another codebook size.
    """
    if cfg.name == "none":
        return None
    if cfg.name == "pixels":
        return PixelTokenizer(codebook_size)
    vqgan, params = load_vqgan(cfg.weights, dtype=cfg.dtype, placement=placement)
    _check_codebook(cfg, vqgan, codebook_size)
    return VQGANTokenizer(vqgan, params, weights_digest(params))


def abstract_tokenizer(cfg: TokenizerConfig, codebook_size: int) -> Tokenizer | None:
    """The tokenizer a config names with shapes for weights, None for `none`.

    Its sizes are those of `tokenizer.weights`, or MaskGIT's where nothing is there yet.

    Raises:
        UserError: something else there than a VQGAN, or one of another codebook size.
    """
    if cfg.name in ("none", "pixels"):
        return load_tokenizer(cfg, codebook_size)
    if (pathlib.Path(cfg.weights) / CHECKPOINTS).is_dir():
        vqgan, _ = _read_vqgan_config(cfg.weights, cfg.dtype)
        _check_codebook(cfg, vqgan, codebook_size)
    else:
        vqgan = VQGANConfig(dtype=cfg.dtype)
        if codebook_size:
            vqgan = dataclasses.replace(vqgan, codebook_size=codebook_size)
    return VQGANTokenizer(vqgan, abstract_vqgan(vqgan)[1], digest="")


def _check_codebook(cfg: TokenizerConfig, vqgan: VQGANConfig, codebook_size: int) -> None:
    if codebook_size not in (0, vqgan.codebook_size):
        raise ConfigError(
            f"config: model.codebook_size = {codebook_size}, the VQGAN in {cfg.weights} has"
            f" {vqgan.codebook_size}"
        )


def abstract_vqgan(cfg: VQGANConfig) -> tuple[Any, nnx.State]:
    """The network's structure and the shapes of its parameters, without any memory."""
    return nnx.split(nnx.eval_shape(lambda: VQGAN(cfg, rngs=nnx.Rngs(0))), nnx.Param)


def load_vqgan(
    path: str | os.PathLike[str], *, dtype: str = "float32", placement: Placement | None = None
) -> tuple[VQGANConfig, nnx.State]:
    """Reads a VQGAN's moving average from a workdir.

    Args:
        path: a workdir of `train_tokenizer` or `convert --kind=vqgan`.
        dtype: of activations.
        placement: on whose devices they are to be replicated; the first device by default.

    Raises:
        CheckpointError: no readable checkpoint of a VQGAN there.
    """
    cfg, checkpoints = _read_vqgan_config(path, dtype)
    _, abstract = abstract_vqgan(cfg)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placement.replicated if placement else None
        ),
        abstract,
    )
    found = checkpoints.restore({"ema": target})
    assert found is not None  # its metadata were there
    return cfg, found[1]["ema"]


def _read_vqgan_config(path: str | os.PathLike[str], dtype: str) -> tuple[VQGANConfig, Checkpoints]:
    folder = pathlib.Path(path) / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer.weights = {os.fspath(path)!r} is no workdir of a VQGAN")
    checkpoints = Checkpoints(folder, read_only=True)
    metadata = checkpoints.metadata()
    if "vqgan" not in metadata:
        raise CheckpointError(f"{folder} holds another model than a VQGAN")
    cfg = make_config(VQGANConfig, metadata["vqgan"])
    return dataclasses.replace(cfg, dtype=dtype), checkpoints
