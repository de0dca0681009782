"""The networks there are, each made from its config."""

from typing import Any

from flax import nnx

from enat_jax.models.autonat.network import AutoNAT, AutoNATConfig
from enat_jax.models.enat.config import ENATConfig, problems
from enat_jax.models.enat.network import ENAT
from enat_jax.models.layers import UNPLACED

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
    placement: Any = UNPLACED,
) -> Network:
    """The network that a config describes; see `ENAT` for `placement`."""
    if isinstance(cfg, AutoNATConfig):
        return AutoNAT(cfg, rngs=rngs, placement=placement)
    return ENAT(cfg, rngs=rngs, placement=placement)
