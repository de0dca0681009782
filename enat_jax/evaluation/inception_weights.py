"""The import table of FID's published Inception weights."""

from functools import partial

from enat_jax.checkpoints.digests import file_digest
from enat_jax.convert.weight_file import about, read_weights
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Inception
from enat_jax.files import Path
from enat_jax.models.import_table import Rule, Weights, below, fill, transpose, window_first

DIGEST = "6726825d"  # of pt_inception-2015-12-05, as its file name ends

# PyTorch layer, our layer
LAYERS = [
    ("Conv2d_1a_3x3", "conv_1a"),
    ("Conv2d_2a_3x3", "conv_2a"),
    ("Conv2d_2b_3x3", "conv_2b"),
    ("Conv2d_3b_1x1", "conv_3b"),
    ("Conv2d_4a_3x3", "conv_4a"),
]

# PyTorch's blocks by their kind; ours are called the same in lower case
BLOCKS = {
    "A": "Mixed_5b Mixed_5c Mixed_5d",
    "B": "Mixed_6a",
    "C": "Mixed_6b Mixed_6c Mixed_6d Mixed_6e",
    "D": "Mixed_7a",
    "E": "Mixed_7b Mixed_7c",
}

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
    Rule("conv.weight", "kernel", window_first),
    Rule("bn.weight", "scale"),
    Rule("bn.bias", "bias"),
    Rule("bn.running_mean", "mean"),
    Rule("bn.running_var", "variance"),
]


def never_read(name: str) -> bool:
    """Whether a published tensor has no part in the features.

    Counters of training batches; and the bias of the logits (see `Features.logits`).
    """
    return name.endswith(".num_batches_tracked") or name == "fc.bias"


def block_rules(kind: str) -> list[Rule]:
    """The rules within a block of a kind, A to E."""
    return [rule for name in BRANCHES[kind].split() for rule in below(TABLE, name, name)]


def inception_rules() -> list[Rule]:
    """One rule per parameter and statistic of `Inception`."""
    table = [rule for layer in LAYERS for rule in below(TABLE, *layer)]
    for kind, names in BLOCKS.items():
        for name in names.split():
            table += below(block_rules(kind), name, name.lower())
    return [*table, Rule("fc.weight", "classifier", transpose)]


def inception_from(weights: Weights, *, dtype: str = "float32") -> Inception:
    """The network with given PyTorch weights, kept in float32; see `import_table.apply_rules`."""
    return fill(partial(Inception, dtype=dtype), inception_rules(), weights, never_read)


def load_inception(path: Path, *, digest: str = DIGEST, dtype: str = "float32") -> Inception:
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
    with about(path):
        actual = file_digest(path)
        if not actual.startswith(digest.lower()):
            raise UserError(
                f"SHA-256 {actual[: max(len(digest), 8)]}..., expected {digest}...:"
                " not FID's published Inception weights, or an incomplete download"
            )
    weights = read_weights(path)
    with about(path):
        return inception_from(weights, dtype=dtype)
