import socket
import threading
import time

import pytest

from enat_jax.parallel.roll_call import RollCallError, gather


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def meet():
    """Lets processes meet, each a thread: (number, count) of each; what became of them."""
    lines = []

    def run(*callers, wait=20.0, port=None):
        port = port or free_port()
        found = [None] * len(callers)

        def call(place, process, processes):
            try:
                found[place] = gather(f"localhost:{port}", process, processes, wait=wait)
            except RollCallError as error:
                found[place] = str(error)

        threads = [
            threading.Thread(target=call, args=(i, *caller)) for i, caller in enumerate(callers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines.extend(line for line in found if not isinstance(line, str))
        return found

    yield run
    for line in lines:
        line.close()


def watched(lines):
    """What each line tells of the others' losses."""
    losses = [[] for _ in lines]
    for line, heard in zip(lines, losses, strict=True):
        line.watch(lambda *loss, heard=heard: heard.append(loss))
    return losses


def test_processes_that_all_come_meet_in_any_order(meet):
    lines = meet((2, 4), (0, 4), (3, 4), (1, 4))
    assert [line.process for line in lines] == [2, 0, 3, 1]
    assert {line.processes for line in lines} == {4}


def test_the_port_is_free_for_another_server_after_the_meeting(meet):
    port = free_port()
    meet((0, 2), (1, 2), port=port)
    with socket.create_server(("localhost", port)):
        pass


def test_who_did_not_come_is_named_to_all_who_did(meet):
    (first, second) = meet((0, 4), (2, 4), wait=1.0)
    assert first == second
    assert "waited 1 s on port " in first
    assert first.endswith(": 2 of 4 processes did not come: 1, 3")


def test_the_missing_of_a_large_run_are_counted(meet):
    (message,) = meet((0, 13), wait=0.1)
    expected = "12 of 13 processes did not come: 1, 2, 3, 4, 5, 6, 7, 8 and 4 more"
    assert message.endswith(expected)


def test_a_process_0_that_does_not_come_is_named_with_its_address_and_the_wait(meet):
    port = free_port()
    (message,) = meet((1, 2), wait=0.5, port=port)
    begins = f"process 1 waited 0.5 s for process 0 at localhost:{port}: "
    assert message == begins + "Connection refused"


def test_a_host_that_cannot_be_found_is_named():
    with pytest.raises(RollCallError, match=r"0.3 s for process 0 at nowhere.invalid:4000: .+"):
        gather("nowhere.invalid:4000", 1, 2, wait=0.3)


@pytest.mark.parametrize(
    ("says", "reason"),
    [(b"SSH-2.0-x\n", "something else"), (b"", "it listens, but gives no answer")],
)
def test_another_server_on_the_port_is_no_process_0(meet, monkeypatch, says, reason):
    monkeypatch.setattr("enat_jax.parallel.roll_call._LATE", 0.1)
    with socket.create_server(("localhost", 0)) as server:
        kept = []

        def answer():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(says)
                kept.append(connection)

        threading.Thread(target=answer, daemon=True).start()
        (message,) = meet((1, 2), wait=0.5, port=server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()
    assert reason in message


def test_a_port_that_is_taken_is_named_by_process_0(meet):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (message,) = meet((0, 2), port=port)
    assert message == f"process 0 cannot listen on port {port}: Address already in use"


def test_processes_that_count_differently_are_told_so(meet):
    first, second = meet((0, 3), (1, 2))
    assert first == second == "process 0 waits for 3 processes, 1 for 2"


def test_two_processes_of_one_number_are_told_so(meet):
    found = meet((0, 3), (1, 3), (1, 3))
    assert set(found) == {"two processes are process 1 of 3"}


@pytest.mark.parametrize("says", [b"GET / HTTP/1.0\r\n\r\n", b"[1, 2]\n", b"{}\n", b"\xff\n", b""])
def test_a_stranger_who_calls_changes_nothing(meet, says):
    port = free_port()

    def knock():
        while True:
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(says)
                return
            except OSError:
                time.sleep(0.01)

    stranger = threading.Thread(target=knock)
    stranger.start()
    process_0 = threading.Thread(target=lambda: found.extend(meet((0, 2), port=port)))
    found = []
    process_0.start()
    stranger.join()
    meet((1, 2), port=port)
    process_0.join()
    assert found[0].processes == 2


def test_one_that_fails_is_heard_by_process_0_and_through_it_by_all(meet):
    lines = meet((0, 3), (1, 3), (2, 3))
    losses = watched(lines)
    lines[1].fail(1, "no disk")
    assert lines[0].loss(10.0) == (1, "no disk")
    teller = threading.Thread(target=lines[0].fail, args=lines[0].loss(0.0))
    teller.start()
    assert lines[2].loss(10.0) == (1, "no disk")
    assert lines[1].loss(10.0) == (1, "no disk")
    lines[1].close()
    lines[2].close()
    teller.join()  # process 0 saw the others go
    assert losses[0] == [(1, "no disk")]
    assert losses[2] == [(1, "no disk")]


def test_one_that_goes_without_a_word_is_missed_once(meet):
    lines = meet((0, 3), (1, 3), (2, 3))
    losses = watched(lines)
    lines[2].close()
    assert lines[0].loss(10.0) == (2, "")
    lines[1].close()
    time.sleep(0.2)
    assert losses[0] == [(2, "")]  # the first is the cause


def test_one_that_hangs_up_when_its_work_is_done_is_not_missed(meet):
    lines = meet((0, 2), (1, 2))
    losses = watched(lines)
    lines[1].hang_up()
    lines[1].close()
    assert lines[0].loss(0.2) is None
    assert losses[0] == []


def test_one_that_fails_after_others_are_done_is_still_heard(meet):
    lines = meet((0, 2), (1, 2))
    watched(lines)
    lines[1].hang_up()
    lines[0].hang_up()
    threading.Thread(target=lines[0].fail, args=(0, "disk full"), daemon=True).start()
    assert lines[1].loss(10.0) == (0, "disk full")
