import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.parallel.gather import from_first_host, gathered
from tests.support.on_hosts import on_two_hosts


def test_one_host_alone_has_what_it_made():
    array = jnp.arange(3)
    np.testing.assert_array_equal(gathered(array), [0, 1, 2])
    assert from_first_host(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    with pytest.raises(ZeroDivisionError):
        from_first_host(lambda: 1 // 0)


TWO_HOSTS = """
import pytest
from enat_jax.errors import UserError
from enat_jax.parallel.gather import from_first_host, gathered
from enat_jax.parallel.placement import MeshConfig, Placement

placement = Placement.of(MeshConfig())
whole = np.arange(24, dtype=np.float32).reshape(8, 3)
for where in (placement.batch, placement.replicated):
    np.testing.assert_array_equal(gathered(placement.put(whole, where)), whole)

calls = []
assert from_first_host(lambda: calls.append(0) or {"done": 0.1 + 0.2}) == {"done": 0.1 + 0.2}
assert len(calls) == (process == 0)
def fails():
    raise OSError("the disk is full")
with pytest.raises(UserError if process else OSError, match="^the disk is full$"):
    from_first_host(fails)
"""


def test_what_two_hosts_hold_comes_together_once():
    on_two_hosts(TWO_HOSTS)
