"""Checkpoints of a run: written, verified, read and gone on from."""
