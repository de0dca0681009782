"""Compares generation settings of trained models: a table, a Pareto plot and an image sheet."""
