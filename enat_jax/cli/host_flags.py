"""The flags of verbs that run on several hosts."""

import sys
import traceback

from absl import flags

from enat_jax.cli.shared_flags import whole_number


def define(values: flags.FlagValues) -> None:
    """Defines the flags; a cluster that JAX knows tells their values by itself."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, if there are more", values)
    whole_number(values, "num_processes", None, "how many processes make up the run")
    whole_number(values, "process_id", None, "which of them this one is, from 0", at_least=0)
    whole_number(values, "wait", 300, "seconds to wait for the others", at_most=10**7)


def connect(args: flags.FlagValues, *, listens: bool = False) -> None:
    """Meets the other processes of the run, before anything else of JAX: see `hosts.connect`.

    Programs that are compiled from here on are kept for the next run.
    """
    from enat_jax.parallel import hosts
    from enat_jax.parallel.compilation import keep_compiled_programs

    hosts.connect(
        args.coordinator, args.num_processes, args.process_id, wait=args.wait, listens=listens
    )
    keep_compiled_programs()


def end(message: str, code: int) -> int:
    """Prints why the verb ends; where there are several processes, ends all of them."""
    hosts = sys.modules.get("enat_jax.parallel.hosts")
    if hosts is not None:
        return hosts.end(message, code)
    print(message, file=sys.stderr)
    return code


def end_by(error: Exception, verb: str) -> int:
    """Ends a verb by an error that nobody foresaw, with its traceback."""
    hosts = sys.modules.get("enat_jax.parallel.hosts")
    if hosts is None or not hosts.several():
        raise error
    traceback.print_exception(error)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return hosts.end(f"enat {verb}: {reason}")
