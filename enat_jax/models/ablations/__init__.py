"""Variants of the papers' ablations."""
