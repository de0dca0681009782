"""Turns weights published for other frameworks into this package's parameters."""
