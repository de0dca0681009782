"""Reveal orders: a priority per position, which the loop adds to the confidence it ranks by."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

_ABOVE_CONFIDENCE = 1e4  # log-probabilities and their noise stay far below

ORDERS: dict[str, Callable[[int], Float[np.ndarray, " l"]]] = {
    "confidence": lambda length: np.zeros(length),
    "raster": lambda length: -_ABOVE_CONFIDENCE * np.arange(length),
}
"""Tokens per image -> priorities of the positions in raster order, the highest revealed first.

`confidence` leaves the ranking to the network (MaskGIT section 3.2); `raster` reveals row by row.
"""
