import jax
import jax.numpy as jnp

from enat_jax.parallel.compilation import compile_seconds


def test_compiling_takes_time_and_running_again_none():
    program = jax.jit(lambda x: jnp.sin(x) @ x + 41)
    before = compile_seconds()
    program(jnp.ones((3, 3)))
    compiled = compile_seconds()
    program(jnp.ones((3, 3)))
    assert before < compiled == compile_seconds()
