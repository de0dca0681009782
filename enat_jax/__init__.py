"""Token-based image synthesis with non-autoregressive Transformers (ENAT, AutoNAT) in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enat_jax.sampling.sampler import load

__all__ = ["__version__", "load"]
__version__: str


def __getattr__(name: str) -> Any:
    """Imports what users ask for when they ask for it, so that importing the package is cheap."""
    if name == "load":
        from enat_jax.sampling.sampler import load

        return load
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("enat_jax")
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
