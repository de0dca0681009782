"""The line between the processes of a run: who has come, who has failed.

JAX's runtime aborts a process, with a stack trace of C++, where another does not come or goes
away. So the processes meet here first, on the port that JAX's coordinator takes over afterwards,
and keep the connections: process 0 holds one to each of the others.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from enat_jax.errors import UserError

_GREETING = "enat"
_RETRY = 0.2  # seconds between two tries to reach process 0
_HELLO = 5.0  # seconds that a caller has to say who it is
_LATE = 2.0  # seconds that process 0 may be behind
_FAREWELL = 5.0  # seconds for the others to end, before process 0 does


class RollCallError(UserError):
    """The processes of a run did not all come."""


class Line:
    """The connections of one process: to all others on process 0, to process 0 elsewhere.

    Attributes:
        process: this process's number.
        processes: how many there are.
    """

    def __init__(self, process: int, processes: int, peers: dict[int, socket.socket]):
        self.process = process
        self.processes = processes
        self._peers = peers
        self._listeners: list[threading.Thread] = []
        self._lost = threading.Event()
        self._loss: tuple[int, str] | None = None
        self._lock = threading.Lock()

    def watch(self, on_loss: Callable[[int, str], object]) -> None:
        """Calls `on_loss` once another process fails or goes away, in a thread.

        Its arguments are that process's number and the reason, "" where it went without a word.
        """
        for peer, connection in self._peers.items():
            arguments = (peer, connection, on_loss)
            listener = threading.Thread(target=self._listen, args=arguments, daemon=True)
            listener.start()
            self._listeners.append(listener)

    def loss(self, seconds: float) -> tuple[int, str] | None:
        """Waits so long for the loss of another process; what `on_loss` gets, None without one."""
        self._lost.wait(seconds)
        return self._loss

    def hang_up(self) -> None:
        """Tells the others that this process has done its work."""
        self._tell({"bye": True})

    def fail(self, process: int, reason: str) -> None:
        """Tells the others why the run ends; process 0 returns when they have ended."""
        self._tell({"failed": reason, "process": process})
        if self.process == 0:
            deadline = time.monotonic() + _FAREWELL
            for listener in self._listeners:
                listener.join(max(deadline - time.monotonic(), 0))

    def close(self) -> None:
        """Ends the connections, as the end of the process does."""
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _listen(
        self, peer: int, connection: socket.socket, on_loss: Callable[[int, str], object]
    ) -> None:
        loss: tuple[int, str] | None = (peer, "")
        with contextlib.suppress(OSError, ValueError):
            for word in _words(connection):  # to the end: `fail` waits for it
                if "bye" in word:
                    loss = None
                elif "failed" in word:
                    loss = word["process"], word["failed"]
                    self._lose(loss, on_loss)
        if loss:
            self._lose(loss, on_loss)

    def _lose(self, loss: tuple[int, str], on_loss: Callable[[int, str], object]) -> None:
        with self._lock:  # the first is the cause, what comes after it follows from it
            first, self._loss = self._loss is None, self._loss or loss
            self._lost.set()
        if first:
            threading.Thread(target=on_loss, args=loss, daemon=True).start()

    def _tell(self, word: dict[str, Any]) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(_as_line(word))


def gather(address: str, process: int, processes: int, *, wait: float) -> Line:
    """Waits until every process of a run is there.

    Args:
        address: host and port of process 0, which listens on that port while it waits.
        process: this process, in [0, processes).
        processes: how many belong to the run.
        wait: seconds, at most.

    Raises:
        RollCallError: not all came; where process 0 was reached, all say the same.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + wait
    if process == 0:
        return _gather_all(int(port), processes, deadline, wait)
    return _report(host.strip("[]"), int(port), process, processes, deadline, wait)


def _gather_all(port: int, processes: int, deadline: float, wait: float) -> Line:
    peers: dict[int, socket.socket] = {}
    callers: list[socket.socket] = []
    complaint = ""
    with _listener(port) as listener:
        while len(peers) < processes - 1 and not complaint:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, processes)) - set(peers))
                complaint = (
                    f"waited {wait:g} s on port {port}: {len(missing)} of {processes} processes"
                    f" did not come: {_numbers(missing)}"
                )
                break
            connection.settimeout(_HELLO)
            try:
                word = next(_words(connection), {})
                peer, count = int(word[_GREETING]), int(word["processes"])
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # a stranger
                continue
            callers.append(connection)
            if count != processes:
                complaint = f"process 0 waits for {processes} processes, {peer} for {count}"
            elif peer in peers:
                complaint = f"two processes are process {peer} of {processes}"
            peers[peer] = connection
    word = {"refused": complaint} if complaint else {"go": True}
    for connection in callers:
        with contextlib.suppress(OSError):
            connection.sendall(_as_line(word))
        if complaint:
            connection.close()
    if complaint:
        raise RollCallError(complaint)
    return Line(0, processes, {peer: _kept(connection) for peer, connection in peers.items()})


def _report(
    host: str, port: int, process: int, processes: int, deadline: float, wait: float
) -> Line:
    reason = "nothing listens there"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host, port), timeout=_HELLO)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_RETRY)
            continue
        try:
            connection.sendall(_as_line({_GREETING: process, "processes": processes}))
            connection.settimeout(max(deadline - time.monotonic(), 0) + _LATE)
            word = next(_words(connection), {})
        except TimeoutError:
            connection.close()
            reason = "it listens, but gives no answer"
            break
        except (OSError, ValueError):
            word = {}
        if "go" in word:
            return Line(process, processes, {0: _kept(connection)})
        connection.close()
        if "refused" in word:
            raise RollCallError(word["refused"])
        reason = "something else listens there"
        time.sleep(_RETRY)
    raise RollCallError(
        f"process {process} waited {wait:g} s for process 0 at {host}:{port}: {reason}"
    )


@contextlib.contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, backlog=1024, dualstack_ipv6=dual
        )
    except OSError as error:
        raise RollCallError(
            f"process 0 cannot listen on port {port}: {os.strerror(error.errno or 0)}"
        ) from error
    with listener:
        yield listener


def _kept(connection: socket.socket) -> socket.socket:
    """A connection that may be silent for hours: a firewall forgets what says nothing."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return connection


def _words(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What is said on a connection until it ends."""
    heard = b""
    while b"\n" not in heard:
        part = connection.recv(4096)
        if not part or len(heard) > 1 << 20:
            return
        heard += part
        while b"\n" in heard:
            line, _, heard = heard.partition(b"\n")
            yield dict(json.loads(line))


def _as_line(word: dict[str, Any]) -> bytes:
    return json.dumps(word).encode() + b"\n"


def _numbers(missing: list[int]) -> str:
    more = len(missing) - 8
    return ", ".join(map(str, missing[:8])) + (f" and {more} more" if more > 0 else "")
