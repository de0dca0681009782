"""Tokenizers: maps between images and grids of discrete token ids."""
