"""Applies a rule table to a weight file, strictly: every tensor used once, every parameter set."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from enat_jax.errors import UserError


class ConvertError(UserError):
    """Weights that do not fit the network; the message names every tensor that does not."""


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


def transpose(x: np.ndarray) -> np.ndarray:
    """A PyTorch linear's `(out, in)` weight as our `(in, out)` kernel."""
    return x.T


def flatten(x: np.ndarray) -> np.ndarray:
    """Drops axes of length 1 around a vector."""
    return x.reshape(-1)


def apply_rules(
    rules: Sequence[Rule],
    weights: Mapping[str, np.ndarray],
    abstract: nnx.State,
    *,
    unused: Callable[[str], bool] = lambda name: False,
) -> nnx.State:
    """Fills a model's parameters from a weight file.

    Args:
        rules: one rule per parameter.
        weights: the file's tensors by name.
        abstract: the model's parameters with their shapes and types.
        unused: which tensors of the file the network never reads.

    Raises:
        ConvertError: tensors missing, extra or misshapen, or parameters no rule fills; all named.
    """
    leaves = dict(nnx.to_flat_state(abstract))
    paths = {".".join(map(str, path)): path for path in leaves}
    unruled = sorted(set(paths) ^ {rule.target for rule in rules})
    if unruled:
        raise ConvertError(f"the rule table and the network differ in {', '.join(unruled)}")
    read = {name for rule in rules for name in rule.names}
    missing = sorted(read - set(weights))
    extra = sorted(name for name in set(weights) - read if not unused(name))

    arrays, misshapen = {}, []
    for rule in rules:
        leaf = leaves[paths[rule.target]]
        shape = leaf.shape if isinstance(rule.source, str) else leaf.shape[1:]
        parts = {name: rule.transform(weights[name]) for name in rule.names if name in weights}
        wrong = [name for name, part in parts.items() if part.shape != shape]
        misshapen += [f"{name} {weights[name].shape} for {rule.target} {shape}" for name in wrong]
        if not wrong and len(parts) == len(rule.names):
            value = np.stack(list(parts.values())).reshape(leaf.shape).astype(leaf.dtype)
            arrays[paths[rule.target]] = leaf.replace(jnp.asarray(value))
    found = {"missing": missing, "extra": extra, "misshapen": misshapen}
    problems = [
        f"{len(names)} {what}: {', '.join(names)}" for what, names in found.items() if names
    ]
    if problems:
        raise ConvertError(f"the weights do not fit the network: {'; '.join(problems)}")
    return nnx.from_flat_state(arrays)
