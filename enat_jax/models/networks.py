"""The networks there are, each made from its config."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from enat_jax.models.autonat.network import AutoNAT, AutoNATConfig
from enat_jax.models.enat.config import ENATConfig, problems
from enat_jax.models.enat.network import ENAT
from enat_jax.models.layers import Constrain

NetworkConfig = ENATConfig | AutoNATConfig
Network = ENAT | AutoNAT


def network_problems(cfg: NetworkConfig) -> list[str]:
    """Which fields cannot be, or do not go together: a phrase each, with value, limit and field."""
    if isinstance(cfg, ENATConfig):
        return problems(cfg)
    if cfg.depth >= 2 and cfg.depth % 2 == 0:
        return []
    return [f"model.depth = {cfg.depth} must be an even number, at least 2"]


def make_network(
    cfg: NetworkConfig,
    *,
    rngs: nnx.Rngs,
    constrain: Constrain = lambda x, how: x,
    place_block: Callable[[Any], Any] = lambda block: block,
) -> Network:
    """The network that a config describes; see `ENAT` for what the callables do."""
    hooks: dict[str, Any] = {"constrain": constrain, "place_block": place_block}
    if isinstance(cfg, AutoNATConfig):
        return AutoNAT(cfg, rngs=rngs, **hooks)
    return ENAT(cfg, rngs=rngs, **hooks)
