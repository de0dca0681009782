r"""Whether a searched strategy is better than where the search began, on noise it never saw.

enat search --config=configs/search_digits.py --workdir=runs/digits_autonat \
        --out=runs/search_digits
enat ablate --config=configs/ablate_searched.py --workdir=runs/digits_autonat \
        --out=runs/digits_searched
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    searched = {"rule": "file", "steps": 4, "file": "runs/search_digits/best.yaml"}
    return ConfigDict(
        {
            "points": {
                "the run's, 4 steps": {"strategy": {"steps": 4}},
                "searched, 4 steps": {"strategy": searched},
            },
            "objective": {"name": "digits"},
            "num_images": 1000,
            "seeds": (1, 2, 3),
        }
    )
