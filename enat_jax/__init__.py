"""Token-based image synthesis with non-autoregressive Transformers (ENAT, AutoNAT) in JAX."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports what users ask for when they ask for it, so that importing the package is cheap."""
    if name == "load":
        from enat_jax.sampling.sampler import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
