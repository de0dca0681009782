"""The networks there are, each made from its config."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from enat_jax.models.autonat import AutoNAT, AutoNATConfig
from enat_jax.models.enat import ENAT, ENATConfig
from enat_jax.models.layers import Constrain

NetworkConfig = ENATConfig | AutoNATConfig
Network = ENAT | AutoNAT


def make_network(
    cfg: NetworkConfig,
    *,
    rngs: nnx.Rngs,
    constrain: Constrain = lambda x, how: x,
    place_block: Callable[[Any], Any] = lambda block: block,
) -> Network:
    """The network that a config describes; see `ENAT` for what the callables do."""
    kind = AutoNAT if isinstance(cfg, AutoNATConfig) else ENAT
    return kind(cfg, rngs=rngs, constrain=constrain, place_block=place_block)
