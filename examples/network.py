"""One call of ENAT on random tokens: 4 revealed earlier, 5 revealed last, 7 still masked."""

import jax.numpy as jnp
from flax import nnx

from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.network import ENAT

model = ENAT(ENATConfig(length=16, codebook_size=32, width=64, num_heads=4), rngs=nnx.Rngs(0))
places = jnp.arange(16)[None]  # the order in which positions are revealed
tokens = Tokens(places[:, 4:9] % 32, places[:, 4:9], places[:, 9:])
condition = model.embed_condition(jnp.array([[3]]))  # a class id
out = model(condition, tokens, RowPlan((Plan(4, 5, 7),)), recalled=jnp.zeros((1, 4, 64)))
print(model.logits(out.masked).shape)  # (1, 7, 32)
