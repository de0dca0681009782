"""The rule table of LPIPS's published weights: torchvision's VGG16 and the linear layers."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from enat_jax.convert.torch_file import read_weights
from enat_jax.evaluation.lpips import LPIPS
from enat_jax.models.import_table import ConvertError, Rule, apply_rules, flatten

# position of each convolution in torchvision's list of layers, stage by stage
VGG16_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def to_window_first(x: np.ndarray) -> np.ndarray:
    """A PyTorch convolution's `(out, in, y, x)` weight as our `(y, x, in, out)` kernel."""
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x  # of other ranks the shape check tells


def never_read(name: str) -> bool:
    """Whether a published tensor has no part in the features: VGG16's classifier."""
    return name.startswith("classifier.")


def rules() -> list[Rule]:
    """One rule per parameter of `LPIPS`."""
    table = []
    for stage, layers in enumerate(VGG16_LAYERS):
        for number, layer in enumerate(layers):
            theirs, ours = f"features.{layer}", f"stages.{stage}.{number}"
            table += [
                Rule(f"{theirs}.weight", f"{ours}.kernel", to_window_first),
                Rule(f"{theirs}.bias", f"{ours}.bias"),
            ]
        table.append(Rule(f"lin{stage}.model.1.weight", f"weights.{stage}", flatten))
    return table


def lpips_from(weights: Mapping[str, np.ndarray]) -> LPIPS:
    """The distance with given PyTorch weights.

    Raises:
        ConvertError: weights that do not fit, every tensor named.
    """
    network = nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(network)
    return nnx.merge(graphdef, apply_rules(rules(), weights, abstract, unused=never_read))


def load_lpips(paths: Sequence[str | os.PathLike[str]]) -> LPIPS:
    """The distance from its published files.

    Args:
        paths: torchvision's `vgg16-397923af.pth` and LPIPS's `vgg.pth` (version 0.1), in any
            order; or one file with the tensors of both.

    Raises:
        UserError: files that cannot be read, that share a tensor, or that do not fit.
    """
    weights: dict[str, np.ndarray] = {}
    for path in paths:
        found = read_weights(path)
        if twice := sorted(weights.keys() & found.keys()):
            raise ConvertError(f"{path}: {', '.join(twice)} are in another file as well")
        weights |= found
    try:
        return lpips_from(weights)
    except ConvertError as error:
        raise ConvertError(f"{', '.join(map(str, paths))}: {error}") from error
