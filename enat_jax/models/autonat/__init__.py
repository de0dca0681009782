"""The network of AutoNAT."""
