"""The network of ENAT."""
