"""Captions as token ids, and what a network reads of them."""
