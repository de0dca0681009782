"""The networks there are, each made from its config."""

from typing import Any

from flax import nnx

from enat_jax.models.ablations.alternating import AlternatingBlock
from enat_jax.models.ablations.memories import AllLayers, AllTokens
from enat_jax.models.ablations.shared_stack import SharedStackNAT
from enat_jax.models.ablations.text_every_step import TextEveryStepENAT
from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.autonat.network import AutoNAT
from enat_jax.models.enat.block import Block
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.memory import LastLayer
from enat_jax.models.enat.network import ENAT
from enat_jax.models.enat.text import TextBlock, TextENAT
from enat_jax.models.layers import UNPLACED

NetworkConfig = ENATConfig | AutoNATConfig


def make_network(
    cfg: NetworkConfig, *, rngs: nnx.Rngs, placement: Any = UNPLACED
) -> ENAT | AutoNAT:
    """The network that a config describes; arguments as `ENAT`'s."""
    if isinstance(cfg, AutoNATConfig):
        return AutoNAT(cfg, rngs=rngs, placement=placement)
    if cfg.condition == "text":
        kind = TextEveryStepENAT if cfg.text_every_step else TextENAT
        return kind(cfg, rngs=rngs, placement=placement, block=TextBlock)
    if cfg.stacks == "shared":
        return SharedStackNAT(cfg, rngs=rngs, placement=placement)
    memory = {"all_tokens": AllTokens, "all_layers": AllLayers}.get(cfg.reuse, LastLayer)(cfg)
    block = AlternatingBlock if cfg.context_attention == "alternating" else Block
    return ENAT(cfg, rngs=rngs, placement=placement, memory=memory, block=block)


def abstract_params(cfg: NetworkConfig, **options: Any) -> tuple[Any, nnx.State]:
    """A network's structure and the shapes of its parameters, without any memory."""
    model = nnx.eval_shape(lambda: make_network(cfg, rngs=nnx.Rngs(0), **options))
    return nnx.split(model, nnx.Param)
