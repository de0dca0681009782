"""The import table of LPIPS's published weights: torchvision's VGG16 and the linear layers."""

from collections.abc import Sequence

import numpy as np

from enat_jax.convert.weight_file import about, read_weights
from enat_jax.errors import UserError
from enat_jax.evaluation.lpips import LPIPS
from enat_jax.files import Path
from enat_jax.models.import_table import Rule, Weights, below, fill, flatten, window_first

# position of each convolution in torchvision's list of layers, stage by stage
VGG16_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

TABLE = [Rule("weight", "kernel", window_first), Rule("bias", "bias")]  # within a convolution


def never_read(name: str) -> bool:
    """Whether a published tensor has no part in the features: VGG16's classifier."""
    return name.startswith("classifier.")


def rules() -> list[Rule]:
    """One rule per parameter of `LPIPS`."""
    table = []
    for stage, layers in enumerate(VGG16_LAYERS):
        for number, layer in enumerate(layers):
            table += below(TABLE, f"features.{layer}", f"stages.{stage}.{number}")
        table.append(Rule(f"lin{stage}.model.1.weight", f"weights.{stage}", flatten))
    return table


def lpips_from(weights: Weights) -> LPIPS:
    """The distance with given PyTorch weights; see `import_table.apply_rules`."""
    return fill(LPIPS, rules(), weights, never_read)


def load_lpips(paths: Sequence[Path]) -> LPIPS:
    """The distance from its published files.

    They are torchvision's `vgg16-397923af.pth` and LPIPS's `vgg.pth` (version 0.1), in any order;
    or one file with the tensors of both.

    Raises:
        UserError: files that cannot be read, that share a tensor, or that do not fit.
    """
    weights: dict[str, np.ndarray] = {}
    for path in paths:
        more = read_weights(path)
        if twice := sorted(weights.keys() & more.keys()):
            raise UserError(f"{path}: {', '.join(twice)} are in another file as well")
        weights |= more
    with about(", ".join(map(str, paths))):
        return lpips_from(weights)
