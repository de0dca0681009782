"""The run that a process belongs to, as flags or a cluster tell it."""

import dataclasses
import importlib.util
import os
import re

from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize()` asks as well

from enat_jax.errors import UserError


class ClusterError(UserError):
    """Nobody says whole and true which processes belong together."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of several processes, as one of them sees it.

    Attributes:
        coordinator: host:port of process 0.
        processes: how many there are, at least 2.
        process: this one's number, in [0, processes).
        local_devices: its accelerators of those on its host; None for all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: list[int] | None = None


def find_run(
    coordinator: str | None, processes: int | None, process: int | None, *, wait: int
) -> Run | None:
    """What the arguments tell, and where they are silent what the cluster does; None when alone.

    Raises:
        ClusterError: too little is told, or what cannot be.
    """
    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
    if processes is not None and processes < 1:
        raise ClusterError(f"--num_processes={processes}, must be at least 1")
    if process is not None and process < 0:
        raise ClusterError(f"--process_id={process}, must be at least 0")
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ClusterError(f"--coordinator={coordinator}, must be host:port")
    if processes == 1 and not process:
        return None
    local_devices = None
    if None in given.values():
        found = _by_the_cluster(wait)
        coordinator = found[0] if coordinator is None else coordinator
        processes = found[1] if processes is None else processes
        process = found[2] if process is None else process
        local_devices = found[3]
    if coordinator is None or processes is None or process is None:
        there = [f"{name}={value}" for name, value in given.items() if value is not None]
        missing = [name for name, value in given.items() if value is None]
        if there:
            raise ClusterError(f"{' '.join(there)} alone: give {', '.join(missing)} as well")
        return None
    if process >= processes:
        raise ClusterError(f"--process_id={process}, must be less than --num_processes={processes}")
    return Run(coordinator, processes, process, local_devices) if processes > 1 else None


def _by_the_cluster(
    wait: int,
) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """What JAX finds in the environment; nothing of it where this process is alone."""
    nothing = None, None, None, None
    ranks = os.environ.get("OMPI_COMM_WORLD_SIZE")
    if ranks == "1" or not _may_have_company():
        return nothing
    method = None
    if ranks and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        method = "mpi4py"  # Open MPI 5 tells no address
        if importlib.util.find_spec("mpi4py") is None:
            raise ClusterError(
                "Open MPI 5 tells no coordinator: install mpi4py, or give --coordinator,"
                " --num_processes and --process_id"
            )
    try:
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, method, wait
        )
    except Exception as error:  # of whichever library asks the cluster
        raise ClusterError(f"the cluster does not say who belongs to the run: {error}") from error
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if re.fullmatch(r"1(\(x\d+\))?", per_node) or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None  # all of the node's, or those chosen; else one for each of its tasks
    return address, count, number, None if devices is None else list(devices)


def _may_have_company() -> bool:
    """Whether to ask JAX for a cluster: on a machine alone it asks no network.

    In any pod of Kubernetes it does, which is an error in one that is no part of a job.
    """
    signs = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_HOSTNAMES",
             "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")  # fmt: skip
    if "KUBERNETES_SERVICE_HOST" not in os.environ or any(name in os.environ for name in signs):
        return True
    if "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    if importlib.util.find_spec("kubernetes") is None:
        raise ClusterError(
            "an indexed job of Kubernetes: install the package kubernetes, or give --coordinator,"
            " --num_processes and --process_id (--num_processes=1 runs alone)"
        )
    return True
