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
from enat_jax.evaluation import collected
from enat_jax.evaluation.collected import Collected
from enat_jax.evaluation.inception import Features
from enat_jax.parallel.placement import MeshConfig, Placement

placement = Placement.of(MeshConfig())
whole = np.arange(24, dtype=np.float32).reshape(8, 3)
for where in (placement.batch, placement.replicated):
    np.testing.assert_array_equal(gathered(put(whole, where)), whole)

calls = []
assert from_first_host(lambda: calls.append(0) or {"done": 0.1 + 0.2}) == {"done": 0.1 + 0.2}
assert len(calls) == (process == 0)
def fails():
    raise OSError("the disk is full")
with pytest.raises(UserError if process else OSError, match="^the disk is full$"):
    from_first_host(fails)

# every host has images of its own; what was saved once is not summed again
collected.POOL_FEATURES = collected.SPATIAL_FEATURES = collected.CLASSES = 4
x = np.random.default_rng(0).normal(size=(40, 4))
mine = Collected.empty(40)
for start in (0, 20):
    rows = np.arange(start + 10 * process, start + 10 * process + 10)
    mine.add(Features(x[rows], x[rows], x[rows]), rows)
    mine = mine.to_first_host()
    counts = (mine.pool.count, mine.spatial.count, mine.sums.counts.sum())
    assert counts == ((0, 0, 0) if process else 3 * (start + 20,)), counts
if process == 0:
    one = Collected.empty(40)
    one.add(Features(x, x, x), np.arange(40))
    np.testing.assert_allclose(mine.pool.covariance(), one.pool.covariance(), rtol=1e-10)
    np.testing.assert_allclose(mine.spatial.mean, one.spatial.mean, rtol=1e-10)
    assert mine.sums.score() == pytest.approx(one.sums.score(), rel=1e-10)
"""


def test_what_two_hosts_hold_comes_together_once():
    on_two_hosts(TWO_HOSTS)
