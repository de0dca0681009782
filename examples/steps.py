"""Compares numbers of steps of a trained run: what each costs."""

import sys

import enat_jax

model = enat_jax.load(sys.argv[1] if sys.argv[1:] else "runs/digits")
for steps in (2, 4, 8, 16):
    print(model.describe(steps=steps))
