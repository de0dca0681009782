"""The networks there are, each made from its config."""

from typing import Any

from flax import nnx

from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.autonat.network import AutoNAT
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.network import ENAT
from enat_jax.models.layers import UNPLACED

NetworkConfig = ENATConfig | AutoNATConfig
Network = ENAT | AutoNAT


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
