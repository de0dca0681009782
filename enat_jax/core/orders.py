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


def position_priority(order: str, length: int | None) -> Float[np.ndarray, " l"] | None:
    """What an order gives positions; None where the ranking is the network's alone.

    Raises:
        ValueError: an unknown order, or one that needs a number of tokens and has none.
    """
    if order not in ORDERS:
        raise ValueError(f"order = {order!r} must be one of {', '.join(ORDERS)}")
    if order == "confidence":
        return None
    if length is None:
        raise ValueError(f"order = {order!r} needs the number of tokens per image")
    return ORDERS[order](length)
