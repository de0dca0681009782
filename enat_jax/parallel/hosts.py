"""Several processes as one run: how they meet, agree, share results, stop and end."""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the coordinator's client has no public name
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize()` asks as well
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped

from enat_jax.errors import UserError, differences

T = TypeVar("T")
_STATE: Any = distributed.global_state
_PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds; a process that fails is noticed otherwise
_FAILED = "enat_jax/failed"  # the key of the run's first failure: [process, message]
_LOOK = 1.0  # seconds between two looks for a failure of another process
_GRACE = 2.0  # seconds in which an error that is the same everywhere ends every process by itself
_FAREWELL = 10.0  # seconds for all to hear of a failure, before any process ends
_JOBS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES",
         "TPU_PROCESS_ADDRESSES")  # fmt: skip
_CALLS = itertools.count()  # of exchanges: the same on every process
_ENDING = threading.Lock()  # held by the thread that ends this process
_SIGNALS: list[int] = []  # that a process alone got since it listens
_stopped: bool | None = None  # the last answer of `preempted` to one of several


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
        wait: seconds to wait for the others; then this process ends, with a line that says so.
        listens: whether this process asks `preempted`, so that SIGTERM need not end it.

    Raises:
        UserError: arguments that cannot be, a cluster that does not answer, a port that is taken,
            or a call after JAX has started.
    """
    if processes == 1 and not process:
        return
    devices = None
    if None in (given := (coordinator, processes, process)):
        coordinator, processes, process, devices = _ask_the_cluster(*given, wait)
        if given == (None, None, None) and processes in (None, 1):
            return
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) < 2**16):
            text = f"--coordinator={coordinator}, must be host:port, a port from 1 to 65535"
            raise UserError(text)
    flags = f"--coordinator={coordinator} --num_processes={processes} --process_id={process}"
    # before JAX's own time-out, an abort with a trace of C++; process 0 has the coordinator, and
    # those who lose it are aborted, too
    seconds = wait + (0 if process else _FAREWELL)
    late = threading.Timer(seconds, _exit, (1, f"enat: waited {wait} s for all processes: {flags}"))
    late.daemon = True
    late.start()
    try:
        jax.config.update("jax_enable_preemption_service", listens)
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            initialization_timeout=wait + 60,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the run of {flags}: {error}") from error
    finally:
        late.cancel()
    threading.Thread(target=_watch, daemon=True).start()


def several() -> bool:
    """Whether this process is one of several."""
    return _STATE.client is not None and _STATE.num_processes > 1


def is_primary() -> bool:
    """Whether this is process 0, which logs and writes for all."""
    return _STATE.process_id == 0


def primary_only(log: Callable[[str], object]) -> Callable[[str], object]:
    """`log` on the primary process, nothing elsewhere."""
    return log if is_primary() else lambda text: None


def all_gather(array: Array) -> Shaped[np.ndarray, "..."]:
    """An array that lies on the devices of several processes, on every one; all call together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def all_gather_text(text: str) -> list[str]:
    """The texts of all processes in their order; all call it together.

    They travel through JAX's coordinator, and a process waits for the others as long as it takes:
    collectives of CPUs give up after 30 seconds.
    """
    if not several():
        return [text]
    call = next(_CALLS)
    _STATE.client.key_value_set(f"enat_jax/{call}/{_STATE.process_id}", text)
    return [_STATE.client.blocking_key_value_get(f"enat_jax/{call}/{process}", _PATIENCE)
            for process in range(_STATE.num_processes)]  # fmt: skip


def from_primary(function: Callable[[], T]) -> T:
    """What a function returns on the primary process, on every process; only there it is called.

    It is something that JSON can hold. All call this together, and none goes on before the primary
    is done.

    Raises:
        UserError: the function raised an error; the primary raises that error itself.
    """
    if not several():
        return function()
    key = f"enat_jax/{next(_CALLS)}"
    if is_primary():
        try:
            value = function()
        except Exception as error:  # the others wait for an answer, whatever happened
            text = str(error) or type(error).__name__
            _STATE.client.key_value_set(key, json.dumps({"error": text}))
            raise
        _STATE.client.key_value_set(key, json.dumps({"value": value}))
    answer = json.loads(_STATE.client.blocking_key_value_get(key, _PATIENCE))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def require_agreement(fields: Mapping[str, Any]) -> None:
    """Raises UserError, the same on every process, unless all were given the same.

    It is what JSON can hold, nested at will; tuples count as lists.
    """
    own = json.loads(json.dumps(fields))
    texts = all_gather_text(differences(from_primary(lambda: own), own))
    if phrases := [f"process {k} has {text}" for k, text in enumerate(texts) if text]:
        raise UserError(f'processes disagree with process 0 ("there"): {"; ".join(phrases[:3])}')


@contextlib.contextmanager
def listen() -> Iterator[None]:
    """Keeps SIGTERM from ending this process, and Ctrl-C once: within, `preempted` tells of both.

    Where there are several processes JAX listens to SIGTERM already.
    """
    _SIGNALS.clear()

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second ends it, wherever it is
        os.write(2, b"interrupted: saves and ends; Ctrl-C once more ends at once\n")
        os.kill(os.getpid(), signal.SIGTERM)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
    if not several():
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda n, _: _SIGNALS.append(n))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def preempted(step: int) -> bool:
    """Whether the run is to save and end now: yes at the same step everywhere.

    Every process asks at every step, in order, from the same first step on; a checkpoint is saved
    under the number asked last, as Orbax asks JAX too. Once any process got SIGTERM all get a yes,
    at most some steps later, and from then on always.
    """
    global _stopped
    if not several():
        return bool(_SIGNALS)
    reached = multihost_utils.reached_preemption_sync_point
    # JAX agrees on the number after the largest that any process asked for, and says yes to that
    # number only: to 1, where the signal came before all first questions.
    if _stopped is None:
        _stopped = step > 1 and reached(1)
    _stopped = _stopped or reached(step)
    return _stopped


def end(message: str, code: int = 1) -> int:
    """Prints why this process ends; where there are several, ends all of them.

    What is wrong everywhere need not be printed by all, what is wrong on one is with its number.

    Returns:
        The exit code, on a process alone; else it does not return.
    """
    if not several():
        print(message, file=sys.stderr)
        return code
    process = _STATE.process_id
    with contextlib.suppress(Exception):  # another failed first, or the coordinator is gone
        _STATE.client.key_value_set(_FAILED, json.dumps([process, message]))
    first, reason = _failure() or (process, message)
    if process:
        known = first != process and reason == message
        message = "" if known else f"{message} (process {process} of {_STATE.num_processes})"
    _leave(code, message)


def _watch() -> None:
    """Ends this process once another has failed: the work of a thread."""
    while several():
        time.sleep(_LOOK)
        process = _STATE.process_id
        first, reason = _failure() or (process, "")
        if first != process:
            time.sleep(_GRACE)
            _leave(1, f"enat: process {process} ends: process {first} failed: {reason}")


def _failure() -> tuple[int, str] | None:
    """The process that failed first, and why; None where none did, or nobody can tell."""
    try:
        return tuple(json.loads(_STATE.client.key_value_try_get(_FAILED)))
    except Exception:  # of JAX's, for a key that is not there; this process may be shutting down
        return None


def _leave(code: int, message: str) -> NoReturn:
    """Ends this process once all have heard of the failure, but does not wait for their work."""
    if not _ENDING.acquire(blocking=False):
        threading.Event().wait()  # for the thread that ends it already
    print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # one was killed
        _STATE.client.wait_at_barrier("enat_jax/end", int(1000 * _FAREWELL))
    if is_primary():
        time.sleep(0.5)  # JAX aborts who is still there when its coordinator goes
    _exit(code)


def _exit(code: int, message: str = "") -> NoReturn:
    print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _ask_the_cluster(
    coordinator: str | None, processes: int | None, process: int | None, wait: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """The arguments that are None, and the devices to use, as JAX learns them from a cluster."""
    environ, ranks = os.environ, os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if "KUBERNETES_SERVICE_HOST" in environ and not any(name in environ for name in _JOBS):
        return coordinator, processes, process, None  # JAX would ask the network of any pod
    # Open MPI 5 tells no address by itself
    method = "mpi4py" if ranks != "1" and "OMPI_MCA_orte_hnp_uri" not in environ else None
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, method, wait
        )
        if processes is None and (ranks != "1" or "JOB_COMPLETION_INDEX" in environ):
            raise ValueError("it does not know this cluster")
    except Exception as error:  # of whichever library asks the cluster
        raise UserError(
            f"JAX cannot tell which processes are one run: {error}; give --coordinator,"
            " --num_processes and --process_id, or --num_processes=1 to run alone"
        ) from error
    if re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        devices = None  # all of the node's; else JAX gives each of its tasks one
    own = None if "JAX_LOCAL_DEVICE_IDS" in environ else devices
    return coordinator, processes, process, own
