"""Replays arrays recorded from PyTorch's VQGAN and Inception on imported ones.

Images and activations are recorded with channels first, as PyTorch has them.
"""

import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Shaped

from enat_jax.convert.verify import Arrays, Comparison, compare
from enat_jax.evaluation.inception import Inception
from enat_jax.models.import_table import ConvertError
from enat_jax.tokenizers.vqgan import VQGAN


def verify_vqgan(model: VQGAN, recorded: Arrays) -> list[Comparison]:
    """Compares the network with a recorded reconstruction and a recorded decoding.

    Keys: `image` (B, 3, Y, X) in [0, 1], with `encoder_out` (B, C, V, U), `indices` (B, V, U),
    `codebook_quant` (B, C, V, U) and `decode` (B, 3, Y, X) of these indices; `random_ids`
    (B, V, U) with `random_decode`. What is there is compared.

    Args:
        model: the imported network, in float32.
        recorded: arrays by key.

    Raises:
        ConvertError: no such keys, or arrays that are no images or token ids of this network.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def encode(params: Any, images: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, params)
        latents = model.encoder(images)
        return latents, model.nearest(latents)

    @jax.jit
    def decode(params: Any, token_ids: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, params)
        b, v, u = token_ids.shape
        return model.codebook[...][token_ids], model.decode(token_ids.reshape(b, v * u), (v, u))

    ours: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        if "image" in recorded:
            images = _images("image", recorded["image"], model.cfg.patch)
            latents, ours["indices"] = encode(params, images)
            ours["encoder_out"] = channels_first(latents)
            token_ids = _ids("indices", recorded.get("indices", ours["indices"]), model)
            codes, pictures = decode(params, token_ids)
            ours |= {"codebook_quant": channels_first(codes), "decode": channels_first(pictures)}
        if "random_ids" in recorded:
            _, pictures = decode(params, _ids("random_ids", recorded["random_ids"], model))
            ours["random_decode"] = channels_first(pictures)
    found = [compare(f"vqgan/{k}", each, recorded[k]) for k, each in ours.items() if k in recorded]
    return _some(found, recorded)


def verify_inception(network: Inception, recorded: Arrays) -> list[Comparison]:
    """Compares pool features with recorded ones, as fractions of the largest one recorded.

    Keys: `<name>/images` (B, 3, Y, X) in [0, 1], with `<name>/features` (B, 2048).

    Raises:
        ConvertError: no such keys, or arrays that are no images.
    """
    graphdef, state = nnx.split(network)
    run = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images).pool)
    names = [found[1] for key in recorded if (found := re.fullmatch(r"(.+)/images", key))]
    names = [name for name in names if f"{name}/features" in recorded]
    found = []
    with jax.default_matmul_precision("highest"):
        for name in names:
            images = _images(f"{name}/images", recorded[f"{name}/images"], 1)
            theirs = recorded[f"{name}/features"]
            largest = np.max(np.abs(theirs))
            ours = np.asarray(run(state, images)) / largest
            found.append(compare(f"{name}, of the largest/features", ours, theirs / largest))
    return _some(found, recorded)


def channels_first(x: Shaped[Any, "b y x c"]) -> Shaped[np.ndarray, "b c y x"]:
    """An activation as PyTorch would have recorded it."""
    return np.asarray(x).transpose(0, 3, 1, 2)


def _images(name: str, images: np.ndarray, patch: int) -> Float[np.ndarray, "b y x 3"]:
    shape = images.shape
    if len(shape) != 4 or shape[1] != 3 or 0 in shape or any(side % patch for side in shape[2:]):
        raise ConvertError(f"{name} is {shape}, want (B, 3, Y, X), sides multiples of {patch}")
    if images.dtype.kind != "f":
        raise ConvertError(f"{name} is {images.dtype}, want floats in [0, 1]")
    return images.transpose(0, 2, 3, 1).astype(np.float32)


def _ids(name: str, token_ids: Any, model: VQGAN) -> Any:
    if token_ids.ndim != 3 or token_ids.dtype.kind not in "iu" or not token_ids.size:
        raise ConvertError(f"{name} is {token_ids.dtype} {token_ids.shape}, want ids (B, V, U)")
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= model.cfg.codebook_size:
        raise ConvertError(
            f"{name} lie in [{low}, {high}], must lie in [0, {model.cfg.codebook_size})"
        )
    return token_ids


def _some(found: list[Comparison], recorded: Arrays) -> list[Comparison]:
    if not found:
        raise ConvertError(f"nothing to verify among the keys {sorted(recorded)[:8]}")
    return found
