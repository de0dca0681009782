import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from enat_jax.core.plans import Plan, generation_plans
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.flops import training_flops
from enat_jax.training.strata import draw_plans, training_strata

CFG = ENATConfig()


def cost(plan):
    return training_flops(CFG, [plan])


def strata(length=256, programs=4, images_per_row=16, **options):
    return training_strata(
        length, cost, programs=programs, images_per_row=images_per_row, **options
    )


def drawn(rows, steps):
    """Plans of all images of so many steps of each program."""
    keys = jax.random.split(jax.random.key(0), len(rows))
    parts = [
        draw_plans(key, row, steps).reshape(-1, 3) for key, row in zip(keys, rows, strict=True)
    ]
    return np.concatenate(parts)


def authors(length, count, reuse):
    """Plans by the authors' rule, each image on its own."""
    rng = np.random.default_rng(1)
    masked = np.clip(np.rint(rng.beta(12, 3, count) * length), 1, length - 1).astype(int)
    new = np.rint((length - masked) * (rng.uniform(size=count) if reuse else 1)).astype(int)
    return np.stack([length - masked - new, new, masked], axis=1)


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_what_is_drawn_is_distributed_as_the_authors_draw(length):
    ours = drawn(strata(length), 5000)  # 4 programs in turns: 20,000 steps
    assert np.all(ours.sum(axis=1) == length)
    assert np.all(ours[:, 2] >= 1)
    assert np.all(ours >= 0)
    images = len(ours) // 64
    reuse = np.repeat([False, True], 8)
    for kind in (False, True):
        own = ours.reshape(4, -1, 16, 3)[:, :, reuse == kind].reshape(-1, 3)
        theirs = authors(length, 40 * images, kind)
        for column in (0, 2):
            distance = stats.ks_2samp(own[:, column], theirs[:, column]).statistic
            assert distance <= 0.01, (kind, column)
    own, theirs = (np.corrcoef(x[:, 0], x[:, 2])[0, 1] for x in (own, theirs))
    assert abs(own - theirs) <= 0.03


def test_every_plan_fits_its_stratums_shape_and_the_shape_is_no_larger():
    for stratum in itertools.chain(*strata()):
        assert stratum.shape == tuple(stratum.plans.max(axis=0))


def test_every_row_spans_the_distribution():
    for row in strata(256):
        masked = np.array([stratum.plans[:, 2].mean() for stratum in row])
        assert abs(masked.mean() / 256 - 0.8) < 0.03
        assert sum(stratum.shape.previous > 0 for stratum in row) == 8


@pytest.mark.parametrize(("images_per_row", "limit"), [(8, 0.27), (16, 0.17), (32, 0.11)])
def test_more_images_a_row_need_less_padding(images_per_row, limit):
    rows = strata(images_per_row=images_per_row)
    shapes = [stratum.shape for row in rows for stratum in row]
    plans = authors(256, 4000, False), authors(256, 4000, True)
    exact = training_flops(CFG, [Plan(*plan) for plan in np.concatenate(plans).tolist()])
    assert 0 < training_flops(CFG, shapes) / exact - 1 <= limit


@pytest.mark.parametrize("length", [2, 3, 16])
@pytest.mark.parametrize("mask_beta", [(12.0, 3.0), (0.1, 0.1), (50.0, 0.1)])
def test_every_image_has_masked_and_visible_tokens(length, mask_beta):
    plans = np.concatenate([s.plans for s in itertools.chain(*strata(length, mask_beta=mask_beta))])
    assert np.all((plans[:, 2] >= 1) & (plans[:, 2] <= length - 1) & np.all(plans >= 0, axis=1))


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (0.25, 8), (1.0, 32)])
def test_the_reuse_probability_is_the_share_of_images_that_reuse(probability, share):
    rows = strata(images_per_row=8, reuse_probability=probability)
    assert sum(s.shape.previous > 0 for s in itertools.chain(*rows)) == share


def test_plans_of_sampling_are_those_of_its_steps():
    rows = strata(64, reuse_probability=1.0, reuse_plans="sampling")
    ours = {tuple(plan) for s in itertools.chain(*rows) for plan in s.plans.tolist()}
    theirs = set()
    for steps in range(4, 17):
        counts = make_strategy(StrategyConfig(steps=steps)).masked_counts(64)
        theirs.update(generation_plans(counts, 64)[1:])
    assert ours == theirs


def test_draws_follow_from_the_key():
    row = strata()[0]
    one, again, other = (draw_plans(jax.random.key(k), row, 4) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    assert np.any(one[0] != one[1])  # rows differ too
