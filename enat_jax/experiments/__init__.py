"""Studies of trained models: search, ablations, similarity."""
