"""What every metric keeps to, whatever it measures."""

import json

import jax
import numpy as np
import pytest

from enat_jax.errors import UserError
from enat_jax.evaluation.digits import digits_objective
from enat_jax.evaluation.frechet import Gaussian, frechet
from enat_jax.evaluation.inception import Features
from enat_jax.evaluation.inception_score import inception_score
from enat_jax.evaluation.metric import Metric, Objective
from enat_jax.evaluation.neighbours import precision_recall_metric
from enat_jax.evaluation.objective import user_function
from enat_jax.parallel.placement import MeshConfig, Placement
from tests.support.on_hosts import on_two_hosts

RNG = np.random.default_rng(0)
COUNT, WIDTH = 40, 64
MADE = RNG.integers(17, size=(COUNT, WIDTH)).astype(np.float32)
CLASS_IDS = np.arange(COUNT, dtype=np.int32) % 10
REAL = RNG.integers(17, size=(50, WIDTH)).astype(np.float64)


def ink(made, class_ids):
    """A user's function."""
    return float(np.sum(made[:, 0] * class_ids))


_DIGITS = digits_objective(REAL, np.arange(50) % 10).metrics
METRICS: dict[str, Metric] = {
    "frechet": frechet("frechet", Gaussian(REAL.mean(axis=0), np.cov(REAL, rowvar=False)),
                       lambda seen: seen.pool),
    "inception_score": inception_score(COUNT),
    "precision_recall": precision_recall_metric(REAL.astype(np.float32)),
    **{name: metric._replace(add=lambda sums, seen, ids, add=metric.add: add(sums, seen.pool, ids))
       for name, metric in zip(("pixels", "accuracy"), _DIGITS, strict=True)},
    "function": user_function("a metric", f"{__name__}:ink")._replace(
        add=lambda sums, seen, ids: ([*sums[0], seen.pool], [*sums[1], ids])),
}  # fmt: skip


def scorer(*names):
    metrics = tuple(METRICS[name] for name in names)
    return Objective("floats", metrics, lambda made: Features(made, made, made)).start()


def score(names, sizes, put=lambda made: made):
    """Of the images in batches of these sizes, each filled up with an image that does not count."""
    scored, end = scorer(*names), 0
    for size in sizes:
        start, end = end, end + size
        batch = MADE[start:end]
        scored.add(put(np.concatenate([batch, MADE[: -size % 4]])), CLASS_IDS[start:end])
    return scored.value()


def flat(value):
    return [x for v in value.values() for x in (v.values() if isinstance(v, dict) else [v])]


@pytest.mark.parametrize("name", METRICS)
class TestEveryMetric:
    def test_names_its_numbers(self, name):
        assert tuple(score([name], [COUNT])) == METRICS[name].names

    @pytest.mark.parametrize("sizes", [(1, 12, 3, 24), (8,) * 5, (1,) * 40])
    def test_is_the_same_of_images_in_any_batches(self, name, sizes):
        assert flat(score([name], sizes)) == pytest.approx(flat(score([name], [COUNT])), rel=1e-9)

    def test_goes_on_from_a_file_to_the_last_bit(self, name, tmp_path):
        once, first, second = scorer(name), scorer(name), scorer(name)
        for each in (once, first):
            each.add(MADE[:13], CLASS_IDS[:13])
        np.savez(tmp_path / "sums.npz", **first.arrays())
        with np.load(tmp_path / "sums.npz") as file:
            second.restore(dict(file))
        for each in (once, second):
            each.add(MADE[13:], CLASS_IDS[13:])
        assert second.value() == once.value()

    def test_refuses_no_images(self, name):
        with pytest.raises(UserError):
            scorer(name).value()

    def test_of_what_is_not_finite_is_nan(self, name):
        wrong = MADE.copy()
        wrong[3, 5] = np.nan
        scored = scorer(name)
        scored.add(wrong, CLASS_IDS)
        assert np.isnan(list(scored.value().values())).all()

    def test_keeps_sets_of_images_apart(self, name):
        one, other = scorer(name), scorer(name)
        one.add(MADE, CLASS_IDS)
        other.add(MADE[::-1] * 2, CLASS_IDS)
        assert one.value() == score([name], [COUNT])


TWO_HOSTS = """
import json
import tests.evaluation.test_contract as t
placement = t.Placement.of(t.MeshConfig())
value = t.score(t.METRICS, (8, 4, 28), lambda made: placement.put(made, placement.batch))
with open(f"{arguments[0]}/{process}.json", "w") as file:
    json.dump(value, file)
"""


def test_two_processes_have_the_numbers_of_one(tmp_path):
    on_two_hosts(TWO_HOSTS, tmp_path)
    one = score(METRICS, (8, 4, 28))
    for process in range(2):
        value = json.loads((tmp_path / f"{process}.json").read_text())
        assert list(value) == list(one)
        assert flat(value) == pytest.approx(flat(one), rel=1e-9)


def test_an_objective_looks_at_batches_on_its_devices():
    placement = Placement.of(MeshConfig())
    add = lambda sums, seen, class_ids: [*sums, seen]  # noqa: E731
    summed = Metric(("sum",), list, add, lambda sums: {"sum": float(np.concatenate(sums).sum())})
    objective = Objective("floats", (summed,), jax.jit(lambda made: 2 * made.sum(axis=1)))
    scored = objective.start()
    scored.add(placement.put(MADE, placement.batch), CLASS_IDS)
    assert scored.value()["sum"] == pytest.approx(2 * MADE.sum())
