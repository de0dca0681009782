"""The rule table of FID's published Inception weights."""

import os
from collections.abc import Mapping

import numpy as np
from flax import nnx

from enat_jax.checkpoints.digests import file_digest
from enat_jax.convert.torch_file import read_weights
from enat_jax.evaluation.inception import Inception
from enat_jax.models.import_table import ConvertError, Rule, apply_rules, transpose

DIGEST = "6726825d"  # of pt_inception-2015-12-05, as its file name ends


def to_window_first(x: np.ndarray) -> np.ndarray:
    """A PyTorch convolution's `(out, in, y, x)` weight as our `(y, x, in, out)` kernel."""
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x  # of other ranks the shape check tells


# PyTorch layer, our layer
LAYERS = [
    ("Conv2d_1a_3x3", "conv_1a"),
    ("Conv2d_2a_3x3", "conv_2a"),
    ("Conv2d_2b_3x3", "conv_2b"),
    ("Conv2d_3b_1x1", "conv_3b"),
    ("Conv2d_4a_3x3", "conv_4a"),
]

# PyTorch block, our block, its kind
BLOCKS = [
    ("Mixed_5b", "mixed_5b", "A"),
    ("Mixed_5c", "mixed_5c", "A"),
    ("Mixed_5d", "mixed_5d", "A"),
    ("Mixed_6a", "mixed_6a", "B"),
    ("Mixed_6b", "mixed_6b", "C"),
    ("Mixed_6c", "mixed_6c", "C"),
    ("Mixed_6d", "mixed_6d", "C"),
    ("Mixed_6e", "mixed_6e", "C"),
    ("Mixed_7a", "mixed_7a", "D"),
    ("Mixed_7b", "mixed_7b", "E"),
    ("Mixed_7c", "mixed_7c", "E"),
]

# layers of a block by its kind; here the names are the same
BRANCHES = {
    "A": """branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3
            branch_pool""",
    "B": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "C": """branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2
            branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool""",
    "D": "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    "E": """branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2
            branch3x3dbl_3a branch3x3dbl_3b branch_pool""",
}

# within a layer: PyTorch name, our name, what happens to the tensor
TABLE = [
    ("conv.weight", "kernel", to_window_first),
    ("bn.weight", "scale", None),
    ("bn.bias", "bias", None),
    ("bn.running_mean", "mean", None),
    ("bn.running_var", "variance", None),
]


def never_read(name: str) -> bool:
    """Whether a published tensor has no part in the features.

    Counters of training batches; and the classifier's bias, which the Inception Score leaves out
    (see `Features.logits`).
    """
    return name.endswith(".num_batches_tracked") or name == "fc.bias"


def layer_rules(source: str, target: str) -> list[Rule]:
    """The rules of one convolution with its normalisation."""
    return [
        Rule(f"{source}.{theirs}", f"{target}.{ours}", how or (lambda x: x))
        for theirs, ours, how in TABLE
    ]


def block_rules(source: str, target: str, kind: str) -> list[Rule]:
    """The rules of one block of a kind, A to E."""
    prefix = f"{target}." if target else ""
    branches = BRANCHES[kind].split()
    return [rule for name in branches for rule in layer_rules(f"{source}.{name}", prefix + name)]


def inception_rules() -> list[Rule]:
    """One rule per parameter and statistic of `Inception`."""
    layers = [rule for layer in LAYERS for rule in layer_rules(*layer)]
    blocks = [rule for block in BLOCKS for rule in block_rules(*block)]
    return [*layers, *blocks, Rule("fc.weight", "classifier", transpose)]


def inception_from(weights: Mapping[str, np.ndarray], *, dtype: str = "float32") -> Inception:
    """The network with given PyTorch weights, kept in float32.

    Raises:
        ConvertError: weights that do not fit, every tensor named.
    """
    network = nnx.eval_shape(lambda: Inception(dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(network)
    return nnx.merge(graphdef, apply_rules(inception_rules(), weights, abstract, unused=never_read))


def load_inception(
    path: str | os.PathLike[str], *, digest: str = DIGEST, dtype: str = "float32"
) -> Inception:
    """FID's Inception network from its published weight file.

    Other weights give other scores under the same name, so the file must be the published one; a
    user who wants another on purpose names its digest.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth`, or another file of such tensors.
        digest: how the hexadecimal SHA-256 of the file begins.
        dtype: of the convolutions' operands.

    Raises:
        UserError: a file that cannot be read, of another digest, or with tensors that do not fit.
    """
    try:
        found = file_digest(path)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror or error}") from error
    if not found.startswith(digest.lower()):
        raise ConvertError(
            f"{path}: SHA-256 {found[: max(len(digest), 8)]}..., expected {digest}...:"
            " not FID's published Inception weights, or an incomplete download"
        )
    try:
        return inception_from(read_weights(path), dtype=dtype)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
