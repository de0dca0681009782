"""How many steps: what each costs, and what it gives, for a run of configs/digits.py.

enat ablate --config=configs/ablate_steps.py --workdir=runs/digits --out=runs/digits_steps
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "grid": {"strategy": {"steps": (4, 6, 8, 12, 16)}},
            "objective": {"name": "digits"},
            "num_images": 1000,
            "seeds": (0, 1, 2),
        }
    )
