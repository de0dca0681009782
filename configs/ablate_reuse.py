"""Reuse at several step counts: projected again at every step, projected once, and none.

enat ablate --config=configs/ablate_reuse.py --workdir=runs/digits --out=runs/digits_reuse
"""

from ml_collections import ConfigDict

STEPS = (4, 6, 8, 12, 16)


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "grid": {"model": {"reproject": (True, False)}, "strategy": {"steps": STEPS}},
            "points": {
                f"no reuse, steps={steps}": {"strategy": {"reuse": False, "steps": steps}}
                for steps in STEPS
            },
            "objective": {"name": "digits"},
            "num_images": 1000,
            "seeds": (0, 1, 2),
        }
    )
