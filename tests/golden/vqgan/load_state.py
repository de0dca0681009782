"""The recorded VQGAN's weights, which are stored in a byte each."""

import json
import pathlib

import numpy as np


def load_state(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """PyTorch name to float32 array; exact, since every value is an int8 times a power of two."""
    bytes_ = np.load(folder / "state_dict_i8.npz")
    exponents = json.loads((folder / "state_dict_exponents.json").read_text())
    return {name: np.ldexp(x.astype(np.float32), exponents[name]) for name, x in bytes_.items()}
