import itertools

import numpy as np
import pytest
from scipy import stats

from enat_jax.core.plans import (
    Plan,
    generation_plans,
    group_into_buckets,
    training_plans,
)
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.models.enat.network import ENATConfig
from enat_jax.models.flops import padding, step_flops

COSINE_8 = (
    (0, 0, 256),
    (0, 5, 251),
    (5, 15, 236),
    (20, 24, 212),
    (44, 31, 181),
    (75, 39, 142),
    (114, 45, 97),
    (159, 48, 49),
)


def cost(plan):
    return step_flops(ENATConfig(), plan)


def cosine_plans(steps, length=256):
    counts = make_strategy(StrategyConfig(steps=steps)).masked_counts(length)
    return generation_plans(counts, length)


class TestGeneration:
    def test_eight_cosine_steps_have_the_counts_of_the_paper(self):
        assert generation_plans((251, 236, 212, 181, 142, 97, 49, 0), 256) == COSINE_8
        assert cosine_plans(8) == COSINE_8

    @pytest.mark.parametrize("length", [64, 256, 1024])
    @pytest.mark.parametrize("steps", [1, 2, 7, 8, 64])
    def test_every_token_is_previous_new_or_masked(self, steps, length):
        plans = cosine_plans(steps, length)
        assert len(plans) == steps
        assert {sum(plan) for plan in plans} == {length}
        assert min(min(plan) for plan in plans) >= 0

    def test_without_reuse_all_visible_tokens_are_new_at_every_step(self):
        plans = generation_plans((251, 236, 212, 181, 142, 97, 49, 0), 256, reuse=False)
        assert plans == tuple((0, before + new, masked) for before, new, masked in COSINE_8)

    def test_previous_tokens_are_all_that_were_visible_one_step_before(self):
        for before, after in itertools.pairwise(cosine_plans(16)):
            assert after.previous == before.previous + before.new

    def test_one_step_predicts_everything_from_nothing(self):
        assert generation_plans((0,), 64) == (Plan(0, 0, 64),)

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ((100, 120, 0), r"\[256, 100, 120, 0\] must not increase"),
            ((300, 0), r"\[256, 300, 0\] must not increase"),
            ((100, 3), r"\[256, 100, 3\] .* be 0 after the last"),
            ((100, 0, 0), r"\[256, 100, 0, 0\] must not increase, and be 0 after the last"),
        ],
    )
    def test_counts_that_cannot_be_are_refused(self, counts, message):
        with pytest.raises(ValueError, match=message):
            generation_plans(counts, 256)


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize(("programs", "images_per_row"), [(4, 8), (2, 16), (1, 8)])
class TestTraining:
    @pytest.fixture
    def rows(self, length, programs, images_per_row):
        return training_plans(length, programs=programs, images_per_row=images_per_row)

    @pytest.fixture
    def masked(self, rows):
        return np.array([[plan.masked for plan in row] for row in rows])

    def test_there_is_one_plan_per_program_and_image(self, rows, programs, images_per_row, length):
        assert [len(row) for row in rows] == [images_per_row] * programs
        assert {sum(plan) for row in rows for plan in row} == {length}

    def test_mask_ratios_have_the_mean_and_spread_of_the_beta_distribution(self, masked, length):
        mean, variance = stats.beta.stats(12, 3)
        assert abs(masked.mean() / length - mean) < 0.01
        assert abs(masked.std() / length - variance**0.5) < 0.01

    def test_every_program_spans_the_whole_distribution(self, masked, images_per_row, length):
        bounds = stats.beta.ppf(np.arange(images_per_row + 1) / images_per_row, 12, 3) * length
        for row in masked:  # one image in each of the equally likely strata
            assert np.all(np.sort(row) >= bounds[:-1] - 0.5)
            assert np.all(np.sort(row) <= bounds[1:] + 0.5)

    def test_half_of_the_images_reuse_features(self, rows, programs, images_per_row):
        reused = np.array([[plan.previous > 0 for plan in row] for row in rows])
        assert abs(reused.mean() - 0.5) <= 1 / reused.size
        share = reused.sum(axis=1) / images_per_row
        assert np.all(np.abs(share - 0.5) <= 1 / images_per_row)

    def test_the_reused_fraction_is_uniform(self, rows, length):
        fractions = np.sort([p.previous / (length - p.masked) for row in rows for p in row
                             if p.previous])  # fmt: skip
        expected = (np.arange(len(fractions)) + 0.5) / len(fractions)
        assert np.abs(fractions - expected).max() < 0.04  # whole tokens of few visible ones


@pytest.mark.parametrize("length", [2, 3, 16, 64])
@pytest.mark.parametrize("mask_beta", [(12.0, 3.0), (0.1, 0.1), (50.0, 0.1)])
def test_every_image_has_masked_and_visible_tokens(length, mask_beta):
    rows = training_plans(length, programs=4, images_per_row=8, mask_beta=mask_beta)
    for plan in itertools.chain(*rows):
        assert 1 <= plan.masked <= length - 1
        assert plan.previous >= 0
        assert plan.new >= 0


def test_one_image_per_row_is_a_row_too():
    rows = training_plans(256, programs=4, images_per_row=1)
    assert [len(row) for row in rows] == [1] * 4
    masked = [row[0].masked for row in rows]
    assert masked == np.rint(256 * stats.beta.ppf([0.125, 0.375, 0.625, 0.875], 12, 3)).tolist()
    assert sum(row[0].previous > 0 for row in rows) == 2


@pytest.mark.parametrize("mask_beta", [(12.0, 3.0), (4.0, 2.0), (0.1, 0.1), (50.0, 0.1)])
def test_mask_ratios_are_the_beta_distributions_quantiles(mask_beta):
    plans = itertools.chain(*training_plans(10**6, programs=4, images_per_row=8,
                                            mask_beta=mask_beta))  # fmt: skip
    expected = 10**6 * stats.beta.ppf((np.arange(32) + 0.5) / 32, *mask_beta)
    masked = np.clip(np.rint(expected), 1, 10**6 - 1)
    assert sorted(plan.masked for plan in plans) == masked.tolist()


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (0.25, 8), (1.0, 32)])
def test_the_reuse_probability_is_the_share_of_images_that_reuse(probability, share):
    rows = training_plans(256, programs=4, images_per_row=8, reuse_probability=probability)
    assert sum(plan.previous > 0 for plan in itertools.chain(*rows)) == share


def test_plans_depend_on_the_seed_alone():
    plans = [training_plans(256, programs=4, images_per_row=8, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def splits(steps):
    """All ways to cut `steps` steps into consecutive groups."""
    for cuts in itertools.product([False, True], repeat=steps - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), steps]
        yield list(itertools.pairwise(bounds))


def padded_cost(plans, guided, groups, cost):
    total = 0.0
    for i, j in groups:
        shape = Plan(*np.max(plans[i:j], axis=0).tolist())
        total += (j - i) * cost(shape) * (2 if any(guided[i:j]) else 1)
    return total


class TestBuckets:
    @pytest.mark.parametrize("buckets", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("seed", range(5))
    def test_no_other_grouping_is_cheaper(self, buckets, seed):
        rng = np.random.default_rng(seed)
        plans = [Plan(*row) for row in rng.integers(0, 50, size=(7, 3)).tolist()]
        guided = rng.integers(2, size=7).astype(bool).tolist()
        weights = rng.uniform(size=3)

        def cost(plan):
            return float(1 + weights @ plan + plan.masked * (plan.previous + plan.new))

        found = group_into_buckets(plans, guided, cost, buckets=buckets)
        assert len(found) == buckets
        assert [plan for bucket in found for plan in bucket.plans] == plans
        ends = np.cumsum([0, *(len(bucket.plans) for bucket in found)]).tolist()
        least = min(
            padded_cost(plans, guided, groups, cost)
            for groups in splits(7)
            if len(groups) == buckets
        )
        ours = padded_cost(plans, guided, list(itertools.pairwise(ends)), cost)
        assert ours == pytest.approx(least)

    def test_a_bucket_has_room_for_each_of_its_steps(self):
        plans = cosine_plans(64)
        guided = [False, *[True] * 63]
        for bucket in group_into_buckets(plans, guided, cost, buckets=5):
            assert bucket.shape == tuple(np.max(bucket.plans, axis=0))
            assert bucket.exact == (len(bucket.plans) == 1)
        assert bucket.guided

    def test_more_buckets_pad_less(self):
        plans = cosine_plans(32)
        guided = [True] * 32
        extra = [
            padding(ENATConfig(), group_into_buckets(plans, guided, cost, buckets=buckets))
            for buckets in range(1, 33)
        ]
        assert all(more > less for more, less in itertools.pairwise(extra))
        assert extra[0] > 0.5
        assert extra[-1] == 0

    @pytest.mark.parametrize("limit", [0.05, 0.15, 0.5])
    def test_the_automatic_choice_is_the_fewest_buckets_within_the_limit(self, limit):
        plans = cosine_plans(64)
        guided = [True] * 64
        chosen = group_into_buckets(plans, guided, cost, max_padding=limit)
        fewer = group_into_buckets(plans, guided, cost, buckets=len(chosen) - 1)
        assert padding(ENATConfig(), chosen) <= limit < padding(ENATConfig(), fewer)
        assert len(chosen) < 64

    def test_sixty_four_steps_pad_at_most_15_percent_by_default(self):
        chosen = group_into_buckets(cosine_plans(64), [True] * 64, cost)
        assert 0 < padding(ENATConfig(), chosen) <= 0.15
        assert len(chosen) <= 12

    @pytest.mark.parametrize("steps", [1, 8, 16])
    def test_up_to_sixteen_steps_nothing_is_padded(self, steps):
        buckets = group_into_buckets(cosine_plans(steps), [True] * steps, cost)
        assert len(buckets) == steps
        assert all(bucket.exact for bucket in buckets)
        assert padding(ENATConfig(), buckets) == 0

    def test_a_bucket_is_guided_if_one_of_its_steps_is(self):
        plans = cosine_plans(4)
        (one,) = group_into_buckets(plans, [False, False, True, False], cost, buckets=1)
        assert one.guided
        (one,) = group_into_buckets(plans, [False] * 4, cost, buckets=1)
        assert not one.guided

    def test_more_buckets_than_steps_are_as_many_as_steps(self):
        assert len(group_into_buckets(cosine_plans(4), [True] * 4, cost, buckets=9)) == 4

    @pytest.mark.parametrize("buckets", [0, -1])
    def test_less_than_one_bucket_is_refused(self, buckets):
        with pytest.raises(ValueError, match=f"buckets is {buckets}, must be at least 1"):
            group_into_buckets(cosine_plans(4), [True] * 4, cost, buckets=buckets)
