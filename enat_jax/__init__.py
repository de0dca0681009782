"""Token-based image synthesis with non-autoregressive Transformers (ENAT, AutoNAT) in JAX."""

from enat_jax.sample import load

__all__ = ["load"]
