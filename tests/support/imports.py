"""Every import of published weights: its table, and weights as the published file has them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from enat_jax.evaluation import inception_weights, lpips_weights
from enat_jax.evaluation.inception import Inception
from enat_jax.evaluation.lpips import LPIPS
from enat_jax.models.autonat import weights as autonat_weights
from enat_jax.models.enat import weights as enat_weights
from enat_jax.models.import_table import fill
from enat_jax.models.networks import make_network
from enat_jax.text import clip_weights
from enat_jax.text.clip import CLIPText
from enat_jax.tokenizers import vqgan_weights
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.golden.vqgan.load_state import load_state
from tests.support.golden import GOLDEN, golden_enat_config
from tests.support.recorded_autonat import recorded_config

RECORDED_VQGAN = VQGANConfig(channels=32, latent_channels=32, codebook_size=64)
SMALL_VQGAN = VQGANConfig(
    channels=8, channel_multipliers=(1, 3), num_res_blocks=3, latent_channels=5, codebook_size=7
)
VGG16 = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512,
         24: 512, 26: 512, 28: 512}  # width by layer  # fmt: skip
NAMES = ["enat", "autonat", "vqgan", "vqgan_flax", "inception", "lpips", "clip_text"]


class Import(NamedTuple):
    """One network's import; `weights` are to be left as they are."""

    make: Callable[..., nnx.Module]
    rules: list
    never_read: Callable[[str], bool]
    weights: dict[str, np.ndarray]

    def model(self, **changes: np.ndarray | None) -> Any:
        """The network, of weights some of which are changed or left out."""
        weights = {n: x for n, x in {**self.weights, **changes}.items() if x is not None}
        return fill(self.make, self.rules, weights, self.never_read)


def token_network(cfg, weights=None) -> Import:
    """The import of ENAT or AutoNAT."""
    table = {"enat": enat_weights, "autonat": autonat_weights}[cfg.name]
    return Import(partial(make_network, cfg), table.rules(cfg), table.never_read, weights or {})


def vqgan(cfg, layout, weights=None) -> Import:
    """The import of a VQGAN in a layout."""
    rules = vqgan_weights.rules(cfg, layout)
    return Import(partial(VQGAN, cfg), rules, vqgan_weights.never_read, weights or {})


def clip_text(file, **changes) -> Import:
    """The import of a recorded text tower, with some fields of its config changed."""
    path = GOLDEN / "clip_text" / file
    weights, beside = load_file(path), json.loads(path.with_name("config.json").read_text())
    cfg = dataclasses.replace(clip_weights.config_of(weights, beside), **changes)
    rules = clip_weights.rules(cfg, clip_weights.layout_of(weights))
    return Import(partial(CLIPText, cfg), rules, clip_weights.never_read, weights)


@functools.cache
def recorded(name: str) -> Import:
    """The import of a recorded network; of one whose weights are not recorded, of ones."""
    match name:
        case "enat":
            return token_network(
                golden_enat_config(), load_file(GOLDEN / "enat/state_dict.safetensors")
            )
        case "autonat":
            return token_network(
                recorded_config(), load_file(GOLDEN / "autonat/state_dict.safetensors")
            )
        case "vqgan":
            return vqgan(RECORDED_VQGAN, "torch", load_state(GOLDEN / "vqgan"))
        case "vqgan_flax":
            torch = recorded("vqgan")
            theirs = {rule.target: rule for rule in torch.rules}
            flax = vqgan_weights.rules(RECORDED_VQGAN, "flax")
            weights = {
                rule.source: how.transform(torch.weights[how.source])
                for rule in flax
                if (how := theirs[rule.target])
            }
            return vqgan(RECORDED_VQGAN, "flax", weights)
        case "inception":
            shapes = json.loads((GOLDEN / "inception/state_dict_shapes.json").read_text())
            rules, unread = inception_weights.inception_rules(), inception_weights.never_read
            return Import(Inception, rules, unread, ones(shapes))
        case "clip_text":
            return clip_text("bigg/state_dict.safetensors")
        case "lpips":
            shapes, before = {"classifier.0.weight": (9, 7)}, 3
            for layer, width in VGG16.items():
                shapes[f"features.{layer}.weight"] = (width, before, 3, 3)
                shapes[f"features.{layer}.bias"] = (width,)
                before = width
            for stage, width in enumerate((64, 128, 256, 512, 512)):
                shapes[f"lin{stage}.model.1.weight"] = (1, width, 1, 1)
            return Import(LPIPS, lpips_weights.rules(), lpips_weights.never_read, ones(shapes))
    raise KeyError(name)


def ones(shapes) -> dict[str, np.ndarray]:
    """Arrays that take no memory."""
    return {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}


def published_vqgan(cfg, layout, dtype=np.float32) -> dict[str, np.ndarray]:
    """Weights of a config by the layout's names: zeros that take no memory."""
    abstract = nnx.state(nnx.eval_shape(lambda: VQGAN(cfg, rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    weights = {}
    for rule in vqgan_weights.rules(cfg, layout):
        shape = shapes[rule.target]
        if layout == "torch" and len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        weights[rule.source] = np.broadcast_to(dtype(0), shape)
    return weights
