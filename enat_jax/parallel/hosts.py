"""Several hosts as one run."""

import atexit
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import xla_bridge
from jax.experimental import multihost_utils

from enat_jax.errors import UserError
from enat_jax.parallel.agreement import from_all
from enat_jax.parallel.cluster import find_run
from enat_jax.parallel.roll_call import Line, gather

_DIFFERENCES = 8  # shown at most
_GRACE = 3.0  # seconds in which an error that is the same everywhere shows on every host


class HostsError(UserError):
    """Processes that cannot work as one run."""


class _Run:
    """What this process knows of the run that it is part of."""

    def __init__(self) -> None:
        self.line: Line | None = None  # to the others, where there are several
        self.ends = threading.Event()  # a thread ends this process because of an error
        self.lock = threading.Lock()
        self.stop = False  # told to stop, by a signal to the only process
        self.stopped = False  # the answer of `preempted`, once it was yes
        self.asked = False  # `preempted` was


_run = _Run()


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    wait: int = 300,
    listens: bool = True,
) -> None:
    """Makes this process one of a run's; alone, where nothing says that there are others.

    By the arguments, or else by what Cloud TPU, GKE, Slurm or Open MPI tell their processes; an
    argument goes before what they say. `processes=1` runs alone on any of them.

    Args:
        coordinator: host:port of process 0.
        processes: how many processes make up the run.
        process: this one's number, in [0, processes).
        wait: seconds to wait for the others, at most.
        listens: whether this process asks `preempted`, so that SIGTERM need not end it.

    Raises:
        ClusterError: arguments that say too little or contradict each other, or a cluster does.
        HostsError: a call that comes too late.
        RollCallError: the processes did not all come.
    """
    run = find_run(coordinator, processes, process, wait=wait)
    if run is None:
        return
    if xla_bridge.backends_are_initialized():
        raise HostsError("hosts.connect comes too late: JAX has started for this process alone")
    _run.line = line = gather(run.coordinator, run.process, run.processes, wait=float(wait))
    line.watch(_end_with_the_others)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", listens)
    jax.distributed.initialize(
        run.coordinator,
        run.processes,
        run.process,
        local_device_ids=run.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=wait,
    )
    atexit.register(line.hang_up)  # before JAX waits for the others to end


def several() -> bool:
    """Whether this process is one of several, whoever made it so."""
    return _run.line is not None or (jax.distributed.is_initialized() and jax.process_count() > 1)


def speaks() -> bool:
    """Whether this process says and writes what the run does: process 0 does."""
    if _run.line is not None:
        return _run.line.process == 0
    return not several() or jax.process_index() == 0


def speaker(say: Callable[[str], object]) -> Callable[[str], object]:
    """`say` on process 0, nothing elsewhere."""
    return say if speaks() else lambda line: None


def barrier(name: str) -> None:
    """Waits until every process is here; all give the same name."""
    if several():
        multihost_utils.sync_global_devices(name)


def require_agreement(fields: Mapping[str, Any]) -> None:
    """Checks that every process was given the same.

    Args:
        fields: what JSON can hold, nested at will; tuples count as lists.

    Raises:
        HostsError: the leaves that differ, and where; the same on every process.
    """
    if not several():
        return
    text = json.dumps(fields, sort_keys=True)
    if len(set(from_all(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    leaves = [_leaves(json.loads(each)) for each in from_all(text)]
    names = sorted(set().union(*leaves))
    differences = []
    for name in names:
        values = [each.get(name, "nothing") for each in leaves]
        if len(set(values)) > 1:
            of = {value: values.index(value) for value in values}  # the first process to say it
            said = [f"{value} on process {process}" for value, process in of.items()]
            differences.append(f"{name} = {', '.join(said[:_DIFFERENCES])}")
    more = len(differences) - _DIFFERENCES
    shown = differences[:_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
    raise HostsError(f"hosts disagree: {'; '.join(shown)}")


@contextlib.contextmanager
def listen() -> Iterator[None]:
    """Keeps SIGTERM from ending this process: within, `preempted` tells of it.

    Where there are several processes JAX listens already, and in another thread than the main one
    nothing can.
    """
    main = threading.current_thread() is threading.main_thread()
    if several() or not main:
        yield
        return

    def stop(*_: object) -> None:
        _run.stop = True

    _run.stop = False
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def preempted(step: int) -> bool:
    """Whether the run is to save and end now: yes at the same step everywhere.

    Every process asks at every step, in order, from the same first step on; a checkpoint is saved
    under the number asked last, as Orbax asks JAX too. Once any process got SIGTERM all get a yes,
    at most some steps later, and from then on always.
    """
    if not several():
        return _run.stop
    reached = multihost_utils.reached_preemption_sync_point
    # JAX agrees on the number after the largest that any process asked for, and says yes to that
    # number only: to 1, where the signal came before all first questions.
    if not _run.asked and step > 1:
        _run.stopped = reached(1)
    _run.asked = True
    _run.stopped = _run.stopped or reached(step)
    return _run.stopped


def end(message: str, code: int = 1) -> int:
    """Says why this process ends; where there are several, ends all of them.

    What is wrong everywhere is said by process 0 alone; what is wrong on one, with its number.

    Returns:
        The exit code, on a process alone; else it does not return.
    """
    line, said = _run.line, message
    if line is None:
        print(message, file=sys.stderr)
        return code
    _end_here()
    if line.process:
        line.fail(line.process, message)
        same = line.loss(2 * _GRACE) == (0, message)
        said = "" if same else f"{message} (process {line.process} of {line.processes})"
    if said:
        print(said, file=sys.stderr)
    if line.process == 0:
        line.fail(0, message)
    _leave(code)


def loss(seconds: float = _GRACE) -> str:
    """What happened to another process, "" where nothing did in so many seconds."""
    found = _run.line.loss(seconds) if _run.line is not None else None
    return _as_text(*found) if found is not None else ""


def _end_with_the_others(process: int, reason: str) -> None:
    line = _run.line
    assert line is not None
    # An error that is the same everywhere shows here too, in a moment.
    if reason and _run.ends.wait(_GRACE):
        return
    _end_here()
    print(f"enat: process {line.process} ends: {_as_text(process, reason)}", file=sys.stderr)
    if line.process == 0:
        line.fail(process, reason)
    _leave(1)


def _end_here() -> None:
    """Makes the calling thread the one that ends this process; another that comes waits for it."""
    with _run.lock:
        first = not _run.ends.is_set()
        _run.ends.set()
    if not first:
        threading.Event().wait()


def _leave(code: int) -> NoReturn:
    """Ends without a farewell to JAX's coordinator, which would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _as_text(process: int, reason: str) -> str:
    return f"process {process} failed: {reason}" if reason else f"process {process} is gone"


def _leaves(tree: Any, name: str = "") -> dict[str, str]:
    """The leaves of nested mappings as JSON, by their dotted names."""
    if isinstance(tree, dict) and tree:
        parts = [_leaves(each, f"{name}.{key}" if name else key) for key, each in tree.items()]
        return {name: value for part in parts for name, value in part.items()}
    return {name: json.dumps(tree)}
