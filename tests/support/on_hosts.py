"""Runs a program as several processes on one machine, each with devices of its own."""

import os
import socket
import subprocess
import sys

PREAMBLE = """
import os, sys, traceback
import jax, numpy as np
def end(*error):  # at once: JAX would wait for the other process first
    traceback.print_exception(*error)
    os._exit(1)
sys.excepthook = end
jax.config.update("jax_default_matmul_precision", "highest")
from enat_jax.parallel import hosts
port, process, *arguments = sys.argv[1:]
process = int(process)
if port:
    hosts.connect(f"localhost:{port}", 2, process, wait=60)
"""


def free_port():
    """A port that nobody has."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def xla_flags(devices):
    """The flags of a process of so many devices, which compiles as the tests do."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def start(code, port, process, *arguments, devices):
    """Starts a program on forced devices of the CPU."""
    env = {**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, "-c", PREAMBLE + code, *map(str, (port, process, *arguments))]
    return subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE)


def assert_succeed(processes):
    """Waits for programs."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(errors), "\n".join(errors)


def on_two_hosts(code, *arguments):
    """Runs a program as two processes of two devices each."""
    port = free_port()
    assert_succeed([start(code, port, process, *arguments, devices=2) for process in range(2)])


def on_devices(code, *arguments, devices):
    """Runs a program as one process of so many devices."""
    assert_succeed([start(code, "", 0, *arguments, devices=devices)])
