import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from enat_jax.parallel import hosts
from enat_jax.parallel.hosts import HostsError

CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR",
            "JAX_LOCAL", "MEGASCALE_")  # fmt: skip

# How each program begins; `import enat_jax` itself would load all of the package.
PREAMBLE = """
import json, os, signal, sys, time, types
sys.modules["enat_jax"] = package = types.ModuleType("enat_jax")
package.__path__ = ["enat_jax"]
from enat_jax.parallel import hosts
port, process = sys.argv[1], int(sys.argv[2])
def connect(**how):
    hosts.connect(f"localhost:{port}", 2, process, wait=60, **how)
def show(*values):
    print(json.dumps(values), flush=True)
"""


def start(code, *arguments):
    """Starts a program on two devices of the CPU, out of any cluster."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    environ |= {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # fmt: skip
    command = [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def both(code):
    """Runs a program as two processes; of each its exit code, what it showed, what it complained.

    Less what JAX's own libraries say of themselves.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for process in [start(code, port, number) for number in range(2)]:
        out, err = process.communicate(timeout=100)
        shown = [json.loads(line) for line in out.splitlines() if line.startswith("[") and
                 "[Gloo]" not in line]  # fmt: skip
        said = [line for line in err.splitlines() if line.startswith("enat")]
        found.append(
            (process.returncode, shown, said or (err.splitlines() if process.returncode else []))
        )
    return found


def test_processes_that_jax_alone_made_a_run_are_one_too():
    (code, shown, _), (other, also, _) = both("""
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)
show(hosts.several(), hosts.speaks())
try:
    hosts.require_agreement({"train": {"steps": process}})
except hosts.HostsError as error:
    show(str(error))
with hosts.listen():
    show(hosts.preempted(1))
""")
    told = ["hosts disagree: train.steps = 0 on process 0, 1 on process 1"]
    assert (code, shown) == (0, [[True, True], told, [False]])
    assert (other, also) == (0, [[True, False], told, [False]])


class TestAlone:
    def test_a_process_alone_starts_as_before(self):
        hosts.connect(processes=1)
        assert not hosts.several()
        assert hosts.speaks()
        assert hosts.speaker(print) is print
        assert hosts.loss(0.0) == ""
        assert not hosts.preempted(0)
        hosts.barrier("nobody is waited for")
        hosts.require_agreement({"nobody": "asked"})

    def test_a_call_after_jax_has_started_is_too_late(self):
        import jax

        jax.devices()
        with pytest.raises(HostsError, match="too late"):
            hosts.connect("localhost:1", 2, 0)

    def test_a_signal_is_told_and_the_handler_put_back(self):
        before = signal.getsignal(signal.SIGTERM)
        with hosts.listen():
            assert not hosts.preempted(0)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert hosts.preempted(1)
            assert hosts.preempted(2)
        assert signal.getsignal(signal.SIGTERM) is before
        with hosts.listen():
            assert not hosts.preempted(0)

    def test_another_thread_than_the_main_one_leaves_the_handler_alone(self):
        before = signal.getsignal(signal.SIGTERM)
        seen = []

        def inside():
            with hosts.listen():
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        assert seen == [before]

    def test_an_end_is_a_line_and_an_exit_code(self, capsys):
        assert hosts.end("enat train: no such thing", 3) == 3
        assert capsys.readouterr().err == "enat train: no such thing\n"


MEET = """
connect()
import jax
hosts.barrier("a")
hosts.speaker(lambda line: show(line))("from one alone")
hosts.require_agreement({"config": {"steps": 4, "layers": (1, 2)}, "jax": jax.__version__})
fields = {"config": {"train": {"steps": 4 + process, "batch": 8}, "name": "é" * process},
          **({"extra": 1} if process else {})}
for given in (fields, {f"f{i:02}": process for i in range(12)}):
    try:
        hosts.require_agreement(given)
    except hosts.HostsError as error:
        show(str(error))
show(jax.device_count(), jax.local_device_count(), hosts.several(), hosts.speaks())
if process == 1:  # done long before the other
    sys.exit()
time.sleep(1)
"""


def test_two_processes_are_one_run_and_find_where_they_disagree():
    (code_0, shown_0, said_0), (code_1, shown_1, said_1) = both(MEET)
    assert (code_0, said_0, code_1, said_1) == (0, [], 0, [])
    assert shown_0.pop(0) == ["from one alone"]
    assert shown_0.pop() == [4, 2, True, True]
    assert shown_1.pop() == [4, 2, True, False]
    assert shown_0 == shown_1
    [first], [second] = shown_0
    assert first == (
        'hosts disagree: config.name = "" on process 0, "\\u00e9" on process 1;'
        " config.train.steps = 4 on process 0, 5 on process 1;"
        " extra = nothing on process 0, 1 on process 1"
    )
    assert second.startswith("hosts disagree: f00 = 0 on process 0, 1 on process 1; f01 = ")
    assert second.endswith("; f07 = 0 on process 0, 1 on process 1; and 4 more")


STOP = """
connect()
from jax.experimental import multihost_utils
def told():
    if process == WHO:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # until the word went round
if WHEN == "before the first step":
    told()
hosts.barrier("a")
for step in range(500, 700):
    with hosts.listen():
        if hosts.preempted(step):
            show(step, hosts.preempted(step + 1))
            break
    if step == 504 and WHEN == "after a save":
        multihost_utils.reached_preemption_sync_point(step)  # as Orbax asks
        hosts.barrier("b")
        told()
    if step == 504 and WHEN == "between two steps" and process == WHO:
        told()
    time.sleep(0.01 * (1 + process))
    hosts.barrier("c")
"""


@pytest.mark.parametrize(
    ("when", "who"),
    [("before the first step", 1), ("after a save", 0), ("between two steps", 0)],
)
def test_sigterm_to_one_process_stops_both_at_the_same_step(when, who):
    (code_0, shown_0, _), (code_1, shown_1, _) = both(f"WHEN, WHO = {when!r}, {who}\n{STOP}")
    assert (code_0, code_1) == (0, 0)
    ((step, still),) = shown_0
    assert shown_1 == shown_0
    assert still is True
    assert step < 699


FAIL = """
hosts._GRACE = 1.0
connect()
hosts.barrier("a")
if process == WHO or WHO == "both":
    time.sleep(0.3 * process)
    if HOW == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    hosts.end("enat train: disk full", 4)
time.sleep(90)
"""


def failure(who, how="end"):
    return both(f"WHO, HOW = {who!r}, {how!r}\n{FAIL}")


def test_an_error_on_process_0_ends_the_other():
    assert failure(0) == [
        (4, [], ["enat train: disk full"]),
        (1, [], ["enat: process 1 ends: process 0 failed: enat train: disk full"]),
    ]


def test_an_error_on_another_process_is_said_with_its_number_and_ends_process_0():
    assert failure(1) == [
        (1, [], ["enat: process 0 ends: process 1 failed: enat train: disk full"]),
        (4, [], ["enat train: disk full (process 1 of 2)"]),
    ]


def test_an_error_that_is_the_same_everywhere_is_said_once():
    assert failure("both") == [(4, [], ["enat train: disk full"]), (4, [], [])]


def test_a_process_that_is_killed_ends_the_other():
    first, (code, _, _) = failure(1, "killed")
    assert first == (1, [], ["enat: process 0 ends: process 1 is gone"])
    assert code == -signal.SIGKILL
