"""Brings to every host what lies on several hosts or on the first."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped

from enat_jax.errors import UserError
from enat_jax.parallel.agreement import from_all

T = TypeVar("T")


def gathered(array: Array) -> Shaped[np.ndarray, "..."]:
    """The whole of an array, on every host; all hosts call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def from_first_host(function: Callable[[], T]) -> T:
    """What a function returns on process 0, on every host; the others do not call it.

    All hosts call it together, and none goes on before process 0 is done.

    Args:
        function: returns what JSON can hold.

    Raises:
        UserError: the function raised an error; process 0 raises that error itself.
    """
    if jax.process_count() == 1:
        return function()
    said: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            said = {"value": function()}
        except Exception as error:  # the other hosts wait for an answer, whatever happened
            failure = error
            said = {"error": str(error) or type(error).__name__}
    said = json.loads(from_all(json.dumps(said))[0])
    if failure is not None:
        raise failure
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]
