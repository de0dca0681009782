"""Compiling: the seconds that it takes, and its results kept for the next process."""

import os

import jax

_EVENTS = (
    "/jax/core/compile/backend_compile_duration",  # holds the reading from a cache
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/jaxpr_trace_duration",
)
_seconds = 0.0


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, unless the user has chosen one."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "enat_jax", "xla"))


def compile_seconds() -> float:
    """Seconds spent on compiling since this import; only differences mean something."""
    return _seconds


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _seconds  # the library's own count of events, which it offers to listeners alone
    if event in _EVENTS:
        _seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)
