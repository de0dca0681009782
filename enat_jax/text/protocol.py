"""What every tokenizer and every encoder of captions offers."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Int32, PyTree


@runtime_checkable
class TextTokenizer(Protocol):
    """What turns captions into rows of token ids, all of one length.

    Attributes:
        name: as configs and records have it.
        length: ids per caption.
        vocabulary: the ids lie in [0, vocabulary).
        digest: of all that decides the ids, in hexadecimal digits.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def vocabulary(self) -> int: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102

    def __call__(self, captions: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Token ids of captions, padded; those of the empty caption stand for none.

        Captions that are too long are cut. The first call with any says how many of its captions
        are, in one line to the `warn` that the tokenizer was made with; later calls do not.
        """
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen network that turns token ids into features; a pure function of arrays.

    Attributes:
        name: as configs and records have it.
        digest: of its weights, in hexadecimal digits.
        width: numbers per token.
        params: the weights, a pytree.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def params(self) -> PyTree: ...  # noqa: D102

    def encode(self, params: PyTree, ids: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        """Features of each token of captions, padding included; width `e`."""
        ...
