"""What the processes of a run agree on before one of them could leave the others waiting."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar, cast

import jax
from jax._src import distributed  # the coordinator's client has no public name

_REFUSED = "\0"  # marks the text of a refusal
_CALLS = itertools.count()  # the same on every process
_PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds; a process that dies is noticed otherwise
_T = TypeVar("_T")


class FailedOnAHost(Exception):
    """Work failed on at least one process; the message is one line, the same on all."""


def agreed(
    work: Callable[[], _T], refusal: type[Exception], line: Callable[[BaseException], str]
) -> _T:
    """What `work` returns on this process, once it has succeeded on all.

    All processes call this together, outside of background threads. `work` must not wait for
    other processes.

    Args:
        work: what to do here.
        refusal: the error to raise on all where `work` raised it on some, with the first's text.
        line: makes a line, which is not empty, of any other error.

    Raises:
        FailedOnAHost: `work` raised another error on at least one.
    """
    value, failure = None, ""
    try:
        value = work()
    except refusal as error:
        failure = f"{_REFUSED}{error}"
    except Exception as error:  # not kept: it holds whatever its frames hold
        failure = line(error)
    failures = from_all(failure)
    for process, told in enumerate(failures):
        if told and not told.startswith(_REFUSED):
            message = f"process {process}: {told}" if len(failures) > 1 else told
            raise FailedOnAHost(message)
    for told in failures:
        if told:
            raise refusal(told.removeprefix(_REFUSED))
    return cast(_T, value)


def from_all(text: str) -> list[str]:
    """The texts of all processes in their order; all call this together.

    They travel through JAX's coordinator, and a process waits for the others as long as it takes:
    collectives of CPUs give up after 30 seconds.
    """
    count, here = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    client = distributed.global_state.client
    assert client is not None  # there are several processes
    call = next(_CALLS)
    client.key_value_set(f"enat_jax/{call}/{here}", text)
    texts = [client.blocking_key_value_get(f"enat_jax/{call}/{process}", _PATIENCE)
             for process in range(count)]  # fmt: skip
    # none goes on, perhaps to its end, and takes the coordinator away, before all have read
    client.wait_at_barrier(f"enat_jax/{call}", _PATIENCE)
    client.key_value_delete(f"enat_jax/{call}/{here}")
    return texts
