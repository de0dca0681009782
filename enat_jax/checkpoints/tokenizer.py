"""The tokenizer that a config names, with its weights from a checkpoint."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.config import TokenizerConfig
from enat_jax.config_file import make_config
from enat_jax.errors import UserError
from enat_jax.parallel.placement import Placement
from enat_jax.text.clip import CLIPTextConfig, abstract_clip
from enat_jax.tokenizers.config import PatchesConfig
from enat_jax.tokenizers.patches import PatchesTokenizer, abstract_patches
from enat_jax.tokenizers.pixels import Pixels
from enat_jax.tokenizers.protocol import Tokenizer
from enat_jax.tokenizers.vqgan import VQGANConfig, VQGANTokenizer, abstract_vqgan

CHECKPOINTS = "checkpoints"  # folder of a workdir
# kind, as the metadata name it: what it is called, its config, and its weights' shapes
_KINDS = {
    "vqgan": ("a VQGAN", VQGANConfig, lambda cfg: abstract_vqgan(cfg)[1]),
    "patches": ("patches", PatchesConfig, abstract_patches),
    "clip_text": ("a text encoder", CLIPTextConfig, lambda cfg: abstract_clip(cfg)[1]),
}


def load_tokenizer(
    cfg: TokenizerConfig, codebook_size: int, placement: Placement | None = None
) -> Tokenizer | None:
    """The tokenizer a config names, None for `none`; its weights as `load_vqgan` places them.

    `codebook_size` is that of the network that is to use it; 0 takes the tokenizer's
    (of `pixels` 256).

    Raises:
        UserError: no weights where the config says, or ones of another codebook size.
    """
    if cfg.name == "none":
        return None
    if cfg.name == "pixels":
        return Pixels(codebook_size or 256)
    if cfg.name == "patches":
        patches, params, _ = load_kind(cfg.weights, "patches", placement)
        tokenizer = PatchesTokenizer(patches, params, weights_digest(params))
    else:
        vqgan, params = load_vqgan(cfg.weights, dtype=cfg.dtype, placement=placement)
        tokenizer = VQGANTokenizer(vqgan, params, weights_digest(params))
    if codebook_size not in (0, tokenizer.codebook_size):
        what = _KINDS[cfg.name][0].removeprefix("a ")
        raise UserError(
            f"config: model.codebook_size = {codebook_size}, the {what} in {cfg.weights} has"
            f" {tokenizer.codebook_size}"
        )
    return tokenizer


def load_vqgan(
    path: str | os.PathLike[str], *, dtype: str = "float32", placement: Placement | None = None
) -> tuple[VQGANConfig, nnx.State]:
    """Reads a VQGAN's EMA from a workdir of `train_tokenizer` or `convert --kind=vqgan`.

    It is replicated on the placement's devices; on the first device by default.

    Raises:
        CheckpointError: no readable checkpoint of a VQGAN there.
    """
    return load_kind(path, "vqgan", placement, dtype=dtype)[:2]


def load_kind(
    path: str | os.PathLike[str],
    kind: str,
    placement: Placement | None,
    *,
    field: str = "tokenizer.weights",
    **changed: Any,
) -> tuple[Any, nnx.State, Mapping[str, Any]]:
    """Config, with some fields changed, EMA and metadata of a frozen network in a workdir.

    It is replicated on the placement's devices; on the first device by default. `field` of the
    user's config names the path.

    Raises:
        CheckpointError: no readable checkpoint of this kind there.
    """
    what, config, abstract = _KINDS[kind]
    folder = pathlib.Path(path) / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{field} = {os.fspath(path)!r} is no workdir of {what}")
    checkpoints = Checkpoints(folder, read_only=True)
    metadata = checkpoints.metadata()
    if kind not in metadata:
        raise CheckpointError(f"{folder} holds another model than {what}")
    cfg = dataclasses.replace(make_config(config, metadata[kind]), **changed)
    sharding = placement.replicated if placement else None
    target = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), abstract(cfg))
    restored = checkpoints.restore({"ema": target})
    assert restored is not None  # its metadata were there
    return cfg, restored[1]["ema"], metadata
