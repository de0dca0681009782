import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.core.network import RowPlan
from enat_jax.core.plans import Plan
from enat_jax.models.rows import Rows

PLANS = (Plan(0, 1, 3), Plan(0, 0, 4), Plan(0, 3, 1))
VISIBLE = jnp.array([[1, 2, 3, 4]])
MASKED = jnp.array([[10, 11, 12, 20, 21, 22, 23, 30]])


def test_each_images_tokens_lie_together_visible_ones_first():
    rows = Rows(4, RowPlan(PLANS)).together(VISIBLE, MASKED)
    np.testing.assert_array_equal(rows, [[1, 10, 11, 12, 20, 21, 22, 23, 2, 3, 4, 30]])


def test_rows_come_apart_as_they_were_features_too():
    rows, of = Rows(4, RowPlan(PLANS)), jnp.arange(3)
    visible, masked = rows.apart(rows.together(VISIBLE[..., None] * of, MASKED[..., None] * of))
    np.testing.assert_array_equal(visible, VISIBLE[..., None] * of)
    np.testing.assert_array_equal(masked, MASKED[..., None] * of)


@pytest.mark.parametrize("visible", [0, 2, 4])
def test_padding_is_left_out_whatever_the_counts_are(visible):
    shape, length = Plan(0, 4, 5), 5  # one token at least is masked

    @jax.jit
    def run(visible):
        rows = Rows(length, RowPlan((shape,), (Plan(0, visible, length - visible),)))
        padded = jnp.where(jnp.arange(4) < visible, jnp.arange(4), -1)
        masked = jnp.where(jnp.arange(5) < length - visible, 10 + jnp.arange(5), -1)
        together = rows.together(padded[None], masked[None])
        return together, rows.apart(together)

    together, parts = run(visible)
    np.testing.assert_array_equal(together, [[*range(visible), *range(10, 10 + length - visible)]])
    np.testing.assert_array_equal(parts[0][0, :visible], range(visible))
    np.testing.assert_array_equal(parts[1][0, : length - visible], range(10, 10 + length - visible))
    assert [part.shape for part in parts] == [(1, 4), (1, 5)]
