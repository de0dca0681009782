import json
import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import distributed

from enat_jax.errors import UserError
from enat_jax.parallel import hosts
from tests.support.on_hosts import free_port, on_two_hosts

CLUSTERS = ("SLURM_", "OMPI_", "TPU_WORKER", "TPU_PROCESS", "KUBERNETES_", "JOB_COMPLETION_INDEX",
            "JAX_COORDINATOR", "JAX_LOCAL", "MEGASCALE_")  # fmt: skip
SLURM = {"SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[07,09-11]", "SLURM_NTASKS": "4",
         "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
         "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1"}  # fmt: skip
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI.items() if "uri" not in name}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


class TestMeeting:
    @pytest.fixture
    def join(self, monkeypatch):
        """`connect` in an environment: what JAX is given, None for a process alone.

        The network may not be asked.
        """

        def refused(*_, **__):
            raise AssertionError("the network is asked")

        for name in ("create_connection", "getaddrinfo", "gethostbyname"):
            monkeypatch.setattr(socket, name, refused)
        given = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *flags, local_device_ids, **_:
                            given.append((*flags, local_device_ids)))  # fmt: skip

        def connect(environ, *flags):
            for name in os.environ:
                if name.startswith(CLUSTERS):
                    monkeypatch.delenv(name)
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            hosts.connect(*flags, wait=1)
            return given.pop() if given else None

        return connect

    @pytest.mark.parametrize("environ", [
        {}, POD, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ])  # fmt: skip
    def test_a_process_without_others_is_alone_and_asks_no_network(self, join, environ):
        assert join(environ) is None

    @pytest.mark.parametrize("environ", [{}, SLURM, OPEN_MPI, OPEN_MPI_5])
    def test_one_process_asked_for_is_alone_on_any_cluster(self, join, environ):
        assert join(environ, None, 1) is None

    @pytest.mark.parametrize(("environ", "expected"), [
        (SLURM, ("gpu07:61444", 4, 2, None)),  # a node's only task gets all its devices
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
         ("gpu07:61444", 4, 2, [1])),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "JAX_LOCAL_DEVICE_IDS": "2,3"},
         ("gpu07:61444", 4, 2, None)),  # JAX reads which
        (OPEN_MPI, ("10.96.0.1:62624", 4, 3, [1])),
    ])  # fmt: skip
    def test_a_cluster_tells_all(self, join, environ, expected):
        assert join(environ) == expected

    def test_flags_go_before_what_a_cluster_tells(self, join):
        assert join(SLURM, "other:4000") == ("other:4000", 4, 2, None)
        assert join(OPEN_MPI_5, "host:4000", 3, 2) == ("host:4000", 3, 2, None)

    @pytest.mark.filterwarnings("ignore:.*Kubernetes environment detected")
    @pytest.mark.parametrize("environ", [OPEN_MPI_5, {**POD, "JOB_COMPLETION_INDEX": "1"}])
    def test_the_processes_of_a_job_that_jax_cannot_ask_do_not_run_alone(self, join, environ):
        with pytest.raises(
            UserError, match=r"JAX cannot tell which .* one run: .*; give --coordinator, "
        ):
            join(environ)

    def test_a_cluster_that_does_not_answer_is_one_line(self, join):
        with pytest.raises(UserError, match=r"JAX cannot tell .* one run: invalid literal"):
            join({**SLURM, "SLURM_NTASKS": "four"})

    @pytest.mark.parametrize(("flags", "message"), [
        (("host:1",), "--coordinator=host:1 --num_processes=None .* Number of processes must be"),
        ((None, 2, 0), "--coordinator=None --num_processes=2 .* coordinator_address should be def"),
        (("host:1", 2, 2), "--process_id=2: .* Got process_id=2, num_processes=2"),
        (("host:1", 2, -1), "Got process_id=-1, num_processes=2"),
        (("host", 2, 1), "--coordinator=host, must be host:port, a port from 1 to 65535"),
    ])  # fmt: skip
    def test_flags_that_say_too_little_or_what_cannot_be_are_named(
        self, join, monkeypatch, flags, message
    ):
        monkeypatch.setattr(jax.distributed, "initialize", distributed.State().initialize)
        with pytest.raises(UserError, match=message):
            join({}, *flags)

    def test_a_call_after_jax_has_started_is_too_late(self):
        jax.devices()
        with pytest.raises(UserError, match=r"must be called before any JAX calls"):
            hosts.connect("localhost:1", 2, 0)


class TestAlone:
    def test_nobody_is_asked_and_nobody_waited_for(self):
        assert not hosts.several()
        assert hosts.is_primary()
        assert hosts.primary_only(print) is print
        assert hosts.all_gather_text("text") == ["text"]
        np.testing.assert_array_equal(hosts.all_gather(jnp.arange(3)), [0, 1, 2])
        hosts.require_agreement({"nobody": ("is", "asked")})
        assert hosts.from_primary(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
        with pytest.raises(ZeroDivisionError):
            hosts.from_primary(lambda: 1 // 0)

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

    def test_a_second_ctrl_c_ends_at_once(self):
        code = """if True:
            import os, signal
            from enat_jax.parallel import hosts
            with hosts.listen():
                os.kill(os.getpid(), signal.SIGINT)
                assert hosts.preempted(0)
                os.kill(os.getpid(), signal.SIGINT)
                print("still here", flush=True)
        """
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert (ran.returncode, ran.stdout) == (-signal.SIGINT, b"")

    def test_an_end_is_a_line_and_an_exit_code(self, capsys):
        assert hosts.end("enat train: no such thing", 3) == 3
        assert capsys.readouterr().err == "enat train: no such thing\n"


def test_two_processes_are_one_run():
    on_two_hosts("""
import pytest, time
from enat_jax.errors import UserError
from enat_jax.parallel.placement import MeshConfig, Placement

assert hosts.several() and hosts.is_primary() == (process == 0)
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
placement = Placement.of(MeshConfig())
array = np.arange(24, dtype=np.float32).reshape(8, 3)
for sharding in (placement.batch, placement.replicated):
    there = jax.make_array_from_callback(array.shape, sharding, lambda rows: array[rows])
    np.testing.assert_array_equal(hosts.all_gather(there), array)

lines, calls = [], []
hosts.primary_only(lines.append)("from one alone")
assert hosts.from_primary(lambda: calls.append(0) or {"done": 0.1 + 0.2}) == {"done": 0.1 + 0.2}
assert len(lines) == len(calls) == (process == 0)
def fails():
    raise OSError("the disk is full")
with pytest.raises(UserError if process else OSError, match="^the disk is full$"):
    hosts.from_primary(fails)

hosts.require_agreement({"train": {"steps": 4, "layers": (1, 2)}, "jax": jax.__version__})
fields = {"train": {"steps": 4 + process, "batch": 8}, "name": "e" * process}
with pytest.raises(UserError) as error:
    hosts.require_agreement(fields)
assert str(error.value) == (
    'processes disagree with process 0 ("there"): process 1 has train.steps = 5, there 4;'
    ' name = "e", there ""'
)
if process == 0:  # done long after the other
    time.sleep(1)
""")


PREAMBLE = """
import json, os, signal, sys, time, types
sys.modules["enat_jax"] = package = types.ModuleType("enat_jax")  # without all that it imports
package.__path__ = ["enat_jax"]
from enat_jax.parallel import hosts
hosts._LOOK, hosts._GRACE = 0.2, 1.0
hosts._FAREWELL = 2.0
port, process, processes, wait = map(int, sys.argv[1:])
hosts.connect(f"localhost:{port}", processes, process, wait=wait)
from jax.experimental.multihost_utils import reached_preemption_sync_point, sync_global_devices
"""


def run(code, processes=2, wait=60):
    """Runs a program as two of so many; of each its exit code, output and lines of ours."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    environ |= {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, *map(str, (port, number, processes, wait))],
            env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    results = []
    for process in running:
        out, err = process.communicate(timeout=100)
        shown = [line for line in out.splitlines() if "[Gloo]" not in line]
        errors = [line for line in err.splitlines() if line.startswith("enat")]
        results.append((process.returncode, shown, errors))
    return results


def test_processes_whose_others_do_not_come_say_so_and_end():
    for number, (code, _, [line]) in enumerate(run("", processes=3, wait=3)):
        assert code == 1
        assert line.startswith("enat: waited 3 s for all processes: --coordinator=localhost:")
        assert line.endswith(f" --num_processes=3 --process_id={number}")


@pytest.mark.parametrize(("when", "who"), [("before the first step", 1), ("after a save", 0)])
def test_sigterm_to_one_process_stops_both_at_the_same_step(when, who):
    (code, [shown], _), other = run(
        f"WHEN, WHO = {when!r}, {who}\n"
        + """
def tell():
    if process == WHO:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # until the word went round
if WHEN == "before the first step":
    tell()
sync_global_devices("a")
for step in range(500, 700):
    with hosts.listen():
        if hosts.preempted(step):
            print(json.dumps([step, hosts.preempted(step + 1)]))
            break
    if step == 504 and WHEN == "after a save":
        reached_preemption_sync_point(step)  # as Orbax asks
        sync_global_devices("b")
        tell()
    time.sleep(0.01 * (1 + process))
    sync_global_devices("c")
"""
    )
    assert (code, [shown], []) == other
    step, still = json.loads(shown)
    assert still is True
    assert step < 699


def failure(who, how="ends"):
    return run(
        f"WHO, HOW = {who!r}, {how!r}\n"
        + """
sync_global_devices("a")
if process in WHO:
    time.sleep(0.3 * process)
    if HOW == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    hosts.end("enat train: disk full", 4)
try:
    sync_global_devices("b")
except Exception:  # Gloo's; other accelerators' collectives do not notice
    hosts.end("enat train: the other is gone", 5)
"""
    )


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_fails_ends_the_other_which_names_it(who):
    results = failure([who])
    suffix = " (process 1 of 2)" if who else ""
    assert results[who] == (4, [], [f"enat train: disk full{suffix}"])
    line = f"enat: process {1 - who} ends: process {who} failed: enat train: disk full"
    assert results[1 - who] == (1, [], [line])


def test_an_error_that_is_the_same_everywhere_is_said_once():
    assert failure([0, 1]) == [(4, [], ["enat train: disk full"]), (4, [], [])]


def test_a_process_that_is_killed_while_others_wait_for_it_ends_them():
    first, (code, _, _) = failure([1], "is killed")
    assert first == (5, [], ["enat train: the other is gone"])
    assert code == -signal.SIGKILL
