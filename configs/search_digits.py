"""A search for a 4-step strategy of digits, from the schedule and scales that the run has.

enat search --config=configs/search_digits.py --workdir=runs/digits_autonat --out=runs/search_digits

AutoNAT's settings are made for FID and temperatures near 1; the digits' choice temperatures are
near 30, so the optimiser here is CMA-ES, whose spread is relative to where it starts. Its first
phase judges by few images, the second by more.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "steps": 4,
            "start": "run",
            "optimiser": "cma",
            "num_images": (200, 400),
            "updates": (12, 4),
            "objective": {"name": "digits"},
        }
    )
