"""Measuring and compiling ahead of time."""
