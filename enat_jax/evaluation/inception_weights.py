"""The import table of FID's published Inception weights."""

from flax import nnx

from enat_jax.checkpoints.digests import file_digest
from enat_jax.convert.weight_file import about, read_weights
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Block, Branches, Conv, Inception
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


def block_rules(branches: Branches) -> list[Rule]:
    """The rules within a block, whose layers are called the same in the file."""
    layers = [layer for branch in branches for layer in branch if isinstance(layer, Conv)]
    names = dict.fromkeys(f"branch{layer.name}" for layer in layers)
    return [rule for name in names for rule in below(TABLE, name, name)]


def inception_rules() -> list[Rule]:
    """One rule per parameter and statistic of `Inception`, whose blocks begin with a capital."""
    table = [rule for layer in LAYERS for rule in below(TABLE, *layer)]
    for name, block in vars(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))).items():
        if isinstance(block, Block):
            table += below(block_rules(block.branches), name.capitalize(), name)
    return [*table, Rule("fc.weight", "classifier", transpose)]


def inception_from(weights: Weights) -> Inception:
    """The network with given PyTorch weights; see `import_table.apply_rules`."""
    return fill(Inception, inception_rules(), weights, never_read)


def load_inception(path: Path, *, digest: str = DIGEST) -> Inception:
    """FID's Inception network from its published weight file.

    Other weights give other scores under the same name, so the file must be the published one; a
    user who wants another on purpose names its digest: how the file's hexadecimal SHA-256 begins.

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
        return inception_from(weights)
