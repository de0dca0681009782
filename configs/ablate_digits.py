"""The paper in small: its baseline, disentangled stacks and ENAT on the digits, at equal FLOPs.

enat ablate --config=configs/ablate_digits.py --out=runs/digits_ablation

It reads nine runs, three seeds each of configs/digits_nat.py, digits_disentangled.py and digits.py:
runs/small/digits_nat-0 and so on; docs/ablations.md has the loop that trains them.
"""

from ml_collections import ConfigDict

NETWORKS = ("digits_nat", "digits_disentangled", "digits")
STEPS = (4, 8, 16)
SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
    runs = tuple(f"runs/small/{name}-{seed}" for name in NETWORKS for seed in SEEDS)
    return ConfigDict(
        {
            "grid": {"strategy": {"steps": STEPS}, "workdir": runs},
            "points": {
                f"projected once, steps={steps}, seed {seed}": {
                    "model": {"reproject": False},
                    "strategy": {"steps": steps},
                    "workdir": f"runs/small/digits-{seed}",
                }
                for steps in STEPS
                for seed in SEEDS
            },
            "objective": {"name": "digits"},
            "num_images": 1000,
            "seeds": (0,),
            "timed_batches": 3,
        }
    )
