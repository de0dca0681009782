"""Token-based image synthesis with non-autoregressive Transformers (ENAT, AutoNAT) in JAX."""
