import importlib.util
import os
import socket

import pytest

from enat_jax.parallel.cluster import ClusterError, Run, find_run

CLUSTERS = ("SLURM_", "OMPI_", "TPU_WORKER", "TPU_PROCESS", "KUBERNETES_", "JOB_COMPLETION_INDEX",
            "JAX_COORDINATOR", "JAX_LOCAL", "MEGASCALE_")  # fmt: skip

SLURM = {"SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[07,09-11]", "SLURM_NTASKS": "4",
         "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
         "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1"}  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No cluster, and a network that may not be asked."""

    def refused(*_, **__):
        raise AssertionError("the network is asked")

    for name in os.environ:
        if name.startswith(CLUSTERS):
            monkeypatch.delenv(name)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refused)


@pytest.fixture
def environ(monkeypatch):
    def update(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return update


def find(coordinator=None, processes=None, process=None):
    return find_run(coordinator, processes, process, wait=1)


def fails(*flags):
    with pytest.raises(ClusterError) as error:
        find(*flags)
    return str(error.value)


def test_a_machine_of_no_cluster_is_alone():
    assert find() is None


def test_flags_say_all_where_they_say_all(environ):
    environ(SLURM)
    assert find("host:4000", 3, 2) == Run("host:4000", 3, 2)


@pytest.mark.parametrize("cluster", [{}, SLURM, OPEN_MPI])
def test_one_process_asked_for_is_alone_on_any_cluster(environ, cluster):
    environ(cluster)
    assert find(None, 1) is None


def test_slurm_tells_all_and_a_nodes_only_task_gets_all_its_devices(environ):
    environ(SLURM)
    assert find() == Run("gpu07:61444", 4, 2, None)  # its port: of the job


def test_one_of_a_slurm_nodes_tasks_gets_one_device_unless_it_chose(environ):
    environ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"})
    assert find().local_devices == [1]
    environ({"JAX_LOCAL_DEVICE_IDS": "2,3"})
    assert find().local_devices is None


def test_open_mpi_tells_all(environ):
    environ(OPEN_MPI)
    found = find()
    assert found.coordinator.startswith("10.96.0.1:")
    assert (found.processes, found.process, found.local_devices) == (4, 3, [1])


def test_a_flag_goes_before_what_the_cluster_says(environ):
    environ(SLURM)
    assert find("other:4000") == Run("other:4000", 4, 2)


@pytest.mark.parametrize("environment", [
    {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
])  # fmt: skip
def test_the_only_task_of_a_cluster_is_alone(environ, environment):
    environ(environment)
    assert find() is None


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is not None, reason="mpi4py is there")
def test_open_mpi_5_wants_mpi4py_or_flags(environ):
    environ({name: value for name, value in OPEN_MPI.items() if "uri" not in name})
    assert fails() == (
        "Open MPI 5 tells no coordinator: install mpi4py, or give --coordinator, --num_processes"
        " and --process_id"
    )
    assert find("host:4000", 4, 3) == Run("host:4000", 4, 3)


@pytest.mark.skipif(importlib.util.find_spec("kubernetes") is not None, reason="it is there")
def test_an_indexed_job_does_not_train_once_per_pod(environ):
    environ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    assert "install the package kubernetes" in fails()
    assert find(None, 1) is None


def test_a_cluster_that_does_not_answer_is_one_line(environ):
    environ({**SLURM, "SLURM_NTASKS": "four"})
    assert fails().startswith("the cluster does not say who belongs to the run: invalid literal")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1",), "--coordinator=host:1 alone: give --num_processes, --process_id as well"),
        (("host:1", 2), "--coordinator=host:1 --num_processes=2 alone: give --process_id as well"),
        ((None, 2, 0), "--num_processes=2 --process_id=0 alone: give --coordinator as well"),
        (("host:1", 2, 2), "--process_id=2, must be less than --num_processes=2"),
        (("host:1", 1, 1), "--process_id=1, must be less than --num_processes=1"),
        (("host:1", 2, -1), "--process_id=-1, must be at least 0"),
        (("host:1", 0, 0), "--num_processes=0, must be at least 1"),
        (("host", 2, 1), "--coordinator=host, must be host:port"),
    ],
)
def test_flags_that_say_too_little_or_what_cannot_be_are_named(flags, message):
    assert fails(*flags) == message
