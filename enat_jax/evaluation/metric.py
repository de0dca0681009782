"""What a metric is: images are added up batch by batch, and give named numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from enat_jax.errors import UserError
from enat_jax.parallel.hosts import all_gather, from_primary, is_primary

Wants = Literal["token_ids", "floats", "uint8"]
Batch = Shaped[Array, "b ..."] | Shaped[np.ndarray, "b ..."]


class Metric(NamedTuple):
    """Named numbers of a set of images.

    What is added up, the sums, is a tree of arrays, which a file can hold; a list in it holds rows,
    batch by batch. The primary process adds up the images of all, in their order.

    Attributes:
        names: of the numbers.
        empty: makes the sums of no image.
        add: makes the sums with further images, of the sums before, what is seen of the images
            (see `Objective.look`) and their class ids.
        value: makes the numbers by name of the sums; raises UserError for too few images.
    """

    names: tuple[str, ...]
    empty: Callable[[], Any]
    add: Callable[[Any, Any, Int[np.ndarray, " b"]], Any]
    value: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Objective:
    """How sets of images are scored.

    Attributes:
        wants: what is made for it: token ids `[b n]`, images in [0, 1] or ones of 256 levels
            `[b y x 3]`.
        metrics: what gives the numbers; the first one of the first is what a search minimises.
        look: makes of a batch what the metrics see of it, a tree of arrays with the images along
            the first axis; the batch itself by default.
        prompts: what is asked for, image i being of prompt i modulo their number, and that number
            standing for its class id; none where images are of classes.
    """

    wants: Wants
    metrics: tuple[Metric, ...]
    look: Callable[[Batch], Any] = lambda made: made
    prompts: Sequence[str] = ()

    def kinds(self, num_classes: int) -> int:
        """How many different things are asked for: prompts, or classes.

        Raises:
            UserError: a model of captions, and an objective without any.
        """
        if not (kinds := len(self.prompts) or num_classes):
            raise UserError("this model makes images of captions, and nothing says which")
        return kinds

    def asked(self, numbers: Int[np.ndarray, " b"]) -> dict[str, Any]:
        """What a sampler is asked for, by the numbers of prompts or classes."""
        if self.prompts:
            return {"prompts": [self.prompts[number] for number in numbers]}
        return {"class_ids": numbers}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all numbers."""
        return tuple(name for metric in self.metrics for name in metric.names)

    def start(self) -> "Scorer":
        """A scorer of a new set of images."""
        return Scorer(self)


class Scorer:
    """The score of one set of images; all processes call it together, for the same images.

    Attributes:
        finite: whether all that was seen is.
    """

    def __init__(self, objective: Objective):
        self.objective, self.finite = objective, True
        self._sums = tuple(metric.empty() for metric in objective.metrics)

    def add(self, made: Batch, class_ids: Int[np.ndarray, " m"]) -> None:
        """Adds a batch of what the objective wants, as many as the devices can share evenly.

        Those that count, which have class ids, are the first.
        """
        self.add_seen(self.objective.look(made), class_ids)

    def add_seen(self, looked: Any, class_ids: Int[np.ndarray, " m"]) -> None:
        """Adds a batch that the objective has looked at already."""
        seen = jax.tree.map(lambda x: _on_host(x)[: len(class_ids)], looked)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(seen)):
            self.finite = False
        elif is_primary():
            pairs = zip(self.objective.metrics, self._sums, strict=True)
            self._sums = tuple(metric.add(sums, seen, class_ids) for metric, sums in pairs)

    def value(self) -> dict[str, Any]:
        """The numbers by name, on every process; NaN where anything seen was not finite.

        Raises:
            UserError: too few images.
        """
        if not self.finite:
            return dict.fromkeys(self.objective.names, math.nan)

        def numbers() -> dict[str, Any]:
            pairs = zip(self.objective.metrics, self._sums, strict=True)
            return {k: v for metric, sums in pairs for k, v in metric.value(sums).items()}

        return from_primary(numbers)

    def arrays(self) -> dict[str, np.ndarray]:
        """What the primary process has added up, for a file; of one batch at least."""
        leaves = jax.tree.leaves(self._sums, is_leaf=_is_rows)
        arrays = (np.concatenate(x) if _is_rows(x) else np.asarray(x) for x in leaves)
        return {str(number): array for number, array in enumerate(arrays)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `arrays` gave."""
        leaves, structure = jax.tree.flatten(self._sums, is_leaf=_is_rows)
        kept = (arrays[str(number)] for number in range(len(leaves)))
        self._sums = structure.unflatten(
            [array] if _is_rows(x) else array for x, array in zip(leaves, kept, strict=True)
        )


def _is_rows(x: Any) -> bool:
    return isinstance(x, list)


def _on_host(batch: Batch) -> Shaped[np.ndarray, "b ..."]:
    return all_gather(batch) if isinstance(batch, jax.Array) else np.asarray(batch)
