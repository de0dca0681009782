"""Import tables: of which tensors of a weight file each parameter is made, applied strictly."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from enat_jax.errors import UserError

Weights = Mapping[str, np.ndarray]  # tensors by their names in the file
M = TypeVar("M", bound=nnx.Module)


class Rule(NamedTuple):
    """How one parameter is made from tensors of a weight file.

    Attributes:
        source: a tensor's name in the file; a tuple of names is stacked along a new first axis.
        target: dotted path of our parameter.
        transform: applied to each tensor on its own.
    """

    source: str | tuple[str, ...]
    target: str
    transform: Callable[[np.ndarray], np.ndarray] = lambda x: x

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors the rule reads."""
        return (self.source,) if isinstance(self.source, str) else self.source


def below(rules: Iterable[Rule], source: str | Sequence[str], target: str) -> list[Rule]:
    """A module's rules where it lies: below a name in the file, or those of a stack's blocks."""
    one = isinstance(source, str)
    return [
        Rule(f"{source}.{x}" if one else tuple(f"{s}.{x}" for s in source), f"{target}.{path}", how)
        for x, path, how in rules
    ]


def transpose(x: np.ndarray) -> np.ndarray:
    """A PyTorch linear's `(out, in)` weight as our `(in, out)` kernel."""
    return x.T


def flatten(x: np.ndarray) -> np.ndarray:
    """Drops axes of length 1 around a vector."""
    return x.reshape(-1)


def window_first(x: np.ndarray) -> np.ndarray:
    """A PyTorch convolution's `(out, in, y, x)` weight as our `(y, x, in, out)` kernel."""
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x  # other ranks fail the check of shapes


def count_names(pattern: str, weights: Weights) -> int:
    """How many different things the pattern's group matches at the start of the names."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def apply_rules(
    rules: Sequence[Rule],
    weights: Weights,
    abstract: nnx.State,
    *,
    unused: Callable[[str], bool] = lambda name: False,
) -> nnx.State:
    """Fills parameters from a weight file: every tensor is used, every parameter set.

    Args:
        rules: one rule per parameter.
        weights: the file's tensors.
        abstract: the parameters' shapes and types.
        unused: which tensors of the file the network never reads.

    Raises:
        UserError: tensors missing, extra, misshapen, not finite or not of floats, or parameters
            that no rule fills; all named.
    """
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
    if unruled := sorted(set(leaves) ^ {rule.target for rule in rules}):
        raise UserError(f"the import table and the network differ in {', '.join(unruled)}")
    read = {name for rule in rules for name in rule.names}
    missing = sorted(read - set(weights))
    extra = sorted(name for name in set(weights) - read if not unused(name))
    misshapen, unfit, arrays = [], [], {}
    for rule in rules:
        path, leaf = leaves[rule.target]
        shape = leaf.shape if isinstance(rule.source, str) else leaf.shape[1:]
        parts = {name: rule.transform(weights[name]) for name in rule.names if name in weights}
        wrong = [name for name, part in parts.items() if part.shape != shape]
        misshapen += [f"{name} {weights[name].shape} for {rule.target} {shape}" for name in wrong]
        for name, part in parts.items():
            if part.dtype.kind in "iub":
                unfit.append(f"{name} of {part.dtype}")
                continue
            with np.errstate(over="ignore"):  # of float64
                if not np.isfinite(part.astype(leaf.dtype)).all():
                    unfit.append(name)
        if not wrong and len(parts) == len(rule.names):
            value = np.stack(list(parts.values())).reshape(leaf.shape).astype(leaf.dtype)
            arrays[path] = leaf.replace(jnp.asarray(value))
    problems = {"missing": missing, "extra": extra, "misshapen": misshapen}
    problems["not finite or no floats"] = unfit
    if any(problems.values()):
        named = (f"{len(n)} {what}: {', '.join(n)}" for what, n in problems.items() if n)
        raise UserError(f"the weights do not fit the network: {'; '.join(named)}")
    return nnx.from_flat_state(arrays)


def fill(
    make: Callable[..., M],
    rules: Sequence[Rule],
    weights: Weights,
    unused: Callable[[str], bool] = lambda name: False,
) -> M:
    """The module that `make(rngs=...)` gives, with imported weights; see `apply_rules`."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, apply_rules(rules, weights, abstract, unused=unused))
