"""How long this process has spent on compiling, or on reading what was compiled before."""

import jax

_EVENTS = (
    "/jax/core/compile/backend_compile_duration",  # holds the reading from a cache
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/jaxpr_trace_duration",
)
_seconds = 0.0


def compile_seconds() -> float:
    """Seconds since the package was imported; only differences mean something."""
    return _seconds


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _seconds  # the library's own count of events, which it offers to listeners alone
    if event in _EVENTS:
        _seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)
