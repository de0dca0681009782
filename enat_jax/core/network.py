"""What the generation loop and the training step ask of a network, and the words they say it in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from enat_jax.core.plans import Plan


class Tokens(NamedTuple):
    """The tokens of a network call, in reveal order, image after image of a row.

    Attributes:
        ids: of the new tokens.
        positions: of the new tokens.
        masked_positions: of the masked ones.
    """

    ids: Int[Array, "b n"]
    positions: Int[Array, "b n"]
    masked_positions: Int[Array, "b m"]


@dataclass(frozen=True)
class RowPlan:
    """Which tokens of a row are whose: the plan of each image in it.

    Attributes:
        plans: one per image, padded where `counts` are given.
        counts: each image's traced counts within its padded plan, `[]` or `[b]`; None where exact.
    """

    plans: tuple[Plan, ...]
    counts: tuple[Plan, ...] | None = None

    def of(self, images: Sequence[int]) -> "RowPlan":
        """The row of some of its images."""
        counts = self.counts and tuple(self.counts[image] for image in images)
        return RowPlan(tuple(self.plans[image] for image in images), counts)

    @property
    def previous(self) -> list[int]:
        """Previous tokens of each image."""
        return [plan.previous for plan in self.plans]

    @property
    def new(self) -> list[int]:
        """New tokens of each image."""
        return [plan.new for plan in self.plans]

    @property
    def masked(self) -> list[int]:
        """Masked tokens of each image."""
        return [plan.masked for plan in self.plans]


class Features(NamedTuple):
    """A row's features by group of tokens, None where a group is empty.

    Attributes:
        previous: what was recalled of earlier steps, as this one read it.
        new: of the new tokens.
        masked: of the masked ones.
    """

    previous: Float[Array, "b _ ... d"] | None
    new: Float[Array, "b _ ... d"] | None
    masked: Float[Array, "b m d"]


@runtime_checkable
class Network(Protocol):
    """ENAT, AutoNAT, or another that predicts masked tokens from those revealed so far.

    A condition is opaque to who calls: a tree of arrays `[b g ...]`, one per image of a row, such
    as class ids. All leaves of an embedded condition and of a memory have the batch first.
    """

    def null_condition(self, condition: PyTree) -> PyTree:
        """What stands for "nothing given", alike in shape: the other branch of guidance."""
        ...

    def embed_condition(self, condition: PyTree) -> PyTree:
        """What the network reads of a condition, the same at every step."""
        ...

    def initial_memory(self, batch: int, capacity: int) -> PyTree:
        """What is carried from step to step, with room for `capacity` revealed tokens."""
        ...

    def predict(
        self, condition: PyTree, memory: PyTree, tokens: Tokens, row: RowPlan
    ) -> tuple[Float[Array, "b m v"], PyTree]:
        """A step of generation: logits of the masked tokens and the next memory."""
        ...

    def recall(self, condition: PyTree, tokens: Tokens, row: RowPlan) -> Any:
        """What an earlier step hands on in training: None, or features of previous tokens.

        `tokens` are the previous ones, with all others masked.
        """
        ...

    def __call__(
        self,
        condition: PyTree,
        tokens: Tokens,
        row: RowPlan,
        *,
        recalled: Any = None,
        key: Any = None,
    ) -> Features:
        """Features of a row's tokens; `key` turns dropout on."""
        ...

    def logits(self, features: Float[Array, "b m d"]) -> Float[Array, "b m v"]:
        """Scores over the codebook, float32."""
        ...
