import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import override_config
from enat_jax.core.strategy import StrategyConfig, make_strategy, write_strategy
from enat_jax.errors import UserError
from enat_jax.evaluation import collected
from enat_jax.evaluation import evaluate as job
from enat_jax.evaluation.evaluate import evaluate
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.evaluation.reference import Reference
from enat_jax.evaluation.scores import frechet_distance_of_moments, inception_score
from enat_jax.sampling.sampler import restore, sampler_of
from tests.support.on_hosts import on_two_hosts

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = 23  # in batches of 20 and 3
P, Q, C = 6, 5, 4  # features in place of Inception's, so that a test takes no minute


class FakeInception(Inception):
    """Random projections of an image's pixels in place of Inception's features."""

    def __init__(self):
        key = jax.random.key(0)
        self.weights = nnx.Param(jax.random.normal(key, (8 * 8 * 3, P + Q + C)))

    def __call__(self, images):
        made = jnp.tanh(images.reshape(len(images), -1) @ self.weights[...] / 4)
        return Features(made[:, :P], made[:, P : P + Q], made[:, P + Q :])


def reference(features=True):
    rng = np.random.default_rng(5)
    pool, spatial = rng.normal(size=(30, P)), rng.normal(size=(30, Q))
    return Reference(
        pool.mean(axis=0), np.cov(pool, rowvar=False), spatial.mean(axis=0),
        np.cov(spatial, rowvar=False), pool.astype(np.float32) if features else None, 30,
    )  # fmt: skip


def patch(setattr):
    """Puts small features in the place of Inception's."""
    for name, size in (("POOL_FEATURES", P), ("SPATIAL_FEATURES", Q), ("CLASSES", C)):
        setattr(collected, name, size)
    setattr(job, "load_inception", lambda path, digest: FakeInception())
    setattr(job, "read_reference", lambda path: reference())


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An evaluation of a tiny run, with small features; files that are named are there."""
    patch(monkeypatch.setattr)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    (tmp_path / "reference.npz").write_bytes(b"statistics")
    return tmp_path


def restored(trained, folder, *overrides):
    mine = [f"evaluate.inception={folder / 'inception.pth'}", f"evaluate.num_images={IMAGES}",
            f"evaluate.reference={folder / 'reference.npz'}", *overrides]  # fmt: skip
    return restore(trained, overrides=lambda fields: override_config(fields, mine))


def direct(trained, folder, seed=0):
    """The same scores from all images at once, in NumPy."""
    sampler = sampler_of(restored(trained, folder))
    images = sampler.sample(np.arange(IMAGES) % 10, seed=seed).astype(np.float32) / 255
    features = FakeInception()(jnp.asarray(images))
    pool, spatial, logits = (np.asarray(each, np.float64) for each in features)
    real = reference()
    fid, sfid = (
        frechet_distance_of_moments(x.mean(axis=0), np.cov(x, rowvar=False), mean, covariance)
        for x, mean, covariance in (
            (pool, real.mean, real.covariance),
            (spatial, real.spatial_mean, real.spatial_covariance),
        )
    )
    return fid, sfid, inception_score(logits)


def test_streamed_scores_are_those_of_all_images_at_once(trained, small):
    result = evaluate(restored(trained, small), small / "fid.json", seed=3, say=lambda _: None)
    fid, sfid, (mean, spread) = direct(trained, small, seed=3)
    for protocol in ("floats", "uint8"):
        found = result["scores"][protocol]
        assert found["fid"] == pytest.approx(fid, rel=1e-5)
        assert found["sfid"] == pytest.approx(sfid, rel=1e-5)
        assert found["inception_score"]["mean"] == pytest.approx(mean, rel=1e-5)
        assert found["inception_score"]["spread"] == pytest.approx(spread, rel=1e-4)
        assert 0 <= found["precision"] <= 1
        assert 0 <= found["recall"] <= 1


def test_the_file_says_everything_that_determines_the_scores(trained, small):
    out = small / "new" / "fid.json"
    result = evaluate(restored(trained, small), out, seed=3, say=lambda _: None)
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(result))
    assert written["images"] == IMAGES
    assert written["seed"] == 3
    assert written["strategy"]["steps"] == 2
    assert written["step"] == 4
    assert len(written["model_digest"]) == 64
    assert len(written["inception_sha256"]) == len(written["reference_sha256"]) == 64
    assert [p.name for p in out.parent.iterdir()] == ["fid.json"]  # nothing else is left


class Stopped(Exception):
    pass


BATCHED = ("sample.batch_size=4", "evaluate.save_every=8")


def stop(run, out, say=lambda _: None):
    """Evaluates until image 20 of 23, which no save has seen; the last saved is image 16."""
    add, seen = job.Collected.add, []

    def stopping(self, features, indices):
        if len(seen) == 9:
            raise Stopped
        seen.append(indices)
        add(self, features, indices)

    job.Collected.add = stopping
    try:
        with pytest.raises(Stopped):
            evaluate(run, out, say=say)
    finally:
        job.Collected.add = add
    assert not out.exists()


def test_an_evaluation_that_was_stopped_goes_on_to_the_same_scores(trained, small):
    whole = evaluate(restored(trained, small, *BATCHED), small / "a.json", say=lambda _: None)
    stop(restored(trained, small, *BATCHED), small / "b.json")
    lines = []
    again = evaluate(restored(trained, small, *BATCHED), small / "b.json", say=lines.append)
    assert "going on from image 16" in lines
    assert again == whole


# As above on two hosts of two devices each; of several files, process 0 alone may write.
ON_TWO_HOSTS = """
import builtins, json, pathlib
import tests.evaluation.test_evaluate as t
workdir, folder = map(pathlib.Path, arguments)
t.patch(builtins.setattr)
run = t.restored(workdir, folder, *t.BATCHED)
own = folder if process == 0 else folder / "elsewhere"  # hosts need no folder in common
lines = []
t.stop(run, own / "stopped_on_two.json")
done = t.evaluate(run, own / "stopped_on_one.json", say=lines.append)
assert ("going on from image 16" in lines) == (process == 0)
assert any("leaves room: each of 4 devices" in line for line in lines) == (process == 0)
with open(f"{folder}/returned.{process}.json", "w") as file:
    json.dump(done, file)
assert own.exists() == (process == 0)
"""


def assert_same_result(found, one):
    """The same but for the order of sums."""
    scores, expected = found.pop("scores"), dict(one)
    for protocol, values in expected.pop("scores").items():
        assert values.keys() == scores[protocol].keys()
        for name, value in values.items():
            assert scores[protocol][name] == pytest.approx(value, rel=1e-9), name
    assert found == json.loads(json.dumps(expected))


def test_two_hosts_find_one_hosts_scores_however_they_were_stopped(trained, small):
    one = evaluate(restored(trained, small, *BATCHED), small / "one.json", say=lambda _: None)
    stop(restored(trained, small, *BATCHED), small / "stopped_on_one.json")
    on_two_hosts(ON_TWO_HOSTS, trained, small)
    lines = []
    there = small / "stopped_on_two.json"
    evaluate(restored(trained, small, *BATCHED), there, say=lines.append)
    assert "going on from image 16" in lines
    for process in range(2):
        assert_same_result(json.loads((small / f"returned.{process}.json").read_text()), one)
    for name in ("stopped_on_one", "stopped_on_two"):
        assert_same_result(json.loads((small / f"{name}.json").read_text()), one)
    assert not list(small.glob("*unfinished*"))


HOSTS_THAT_DISAGREE = """
import builtins, pathlib
import tests.evaluation.test_evaluate as t
from enat_jax.errors import UserError
workdir, folder = map(pathlib.Path, arguments)
t.patch(builtins.setattr)
try:
    t.evaluate(t.restored(workdir, folder), folder / "a.json", seed=process)
except UserError as error:
    assert str(error).endswith(": process 1 has seed = 1, there 0"), error
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_hosts_that_were_asked_for_different_things_are_told_so(trained, small):
    on_two_hosts(HOSTS_THAT_DISAGREE, trained, small)
    assert not (small / "a.json").exists()


def test_an_unfinished_evaluation_of_something_else_is_named(trained, small, monkeypatch):
    def stopping(state):
        save(state)
        raise Stopped

    save = job._State.save
    monkeypatch.setattr(job._State, "save", stopping)
    options = ("sample.batch_size=4", "evaluate.save_every=4")
    with pytest.raises(Stopped):
        evaluate(restored(trained, small, *options), small / "a.json", say=lambda _: None)
    with pytest.raises(UserError, match=r"another evaluation \(seed = 1, there 0\): remove it"):
        evaluate(restored(trained, small, *options), small / "a.json", seed=1, say=lambda _: None)


def test_images_are_not_lost_where_their_scores_cannot_be_had(trained, small, monkeypatch):
    whole = evaluate(restored(trained, small), small / "a.json", say=lambda _: None)
    scores = job.Collected.scores

    def failing(self, reference):
        raise Stopped

    monkeypatch.setattr(job.Collected, "scores", failing)
    with pytest.raises(Stopped):
        evaluate(restored(trained, small), small / "b.json", say=lambda _: None)
    monkeypatch.setattr(job.Collected, "scores", scores)
    monkeypatch.setattr(job.Sampler, "batches", None)  # no image is made again
    assert evaluate(restored(trained, small), small / "b.json", say=lambda _: None) == whole


def test_devices_have_the_next_batch_before_one_is_looked_at():
    asked = []

    def batches():
        for number in range(3):
            asked.append(number)
            yield number

    seen = [(number, len(asked)) for number in job._one_ahead(batches())]
    assert seen == [(0, 2), (1, 3), (2, 3)]


def test_each_protocol_sees_its_own_images(trained, small, monkeypatch):
    whole = evaluate(restored(trained, small), small / "a.json", say=lambda _: None)["scores"]
    monkeypatch.setattr(job, "as_uint8", lambda images: (images > 0.5).astype(jnp.uint8) * 255)
    found = evaluate(restored(trained, small), small / "b.json", say=lambda _: None)["scores"]
    assert found["floats"] == whole["floats"]
    assert abs(found["uint8"]["fid"] - whole["uint8"]["fid"]) > 1e-3


def test_what_a_strategy_file_says_is_written_down(trained, small, tmp_path):
    file = tmp_path / "strategy.yaml"
    write_strategy(make_strategy(StrategyConfig(steps=2, guidance_scale=3.0)), file)
    own = (f"strategy.file={file}", "strategy.rule=file")
    result = evaluate(restored(trained, small, *own), small / "a.json", say=lambda _: None)
    assert result["strategy_by_step"]["guidance_scale"] == [0.0, 1.5]


def test_few_images_are_warned_of_with_the_number(trained, small):
    lines = []
    evaluate(restored(trained, small), small / "a.json", say=lines.append)
    assert any(f"FID of {IMAGES} images is biased upwards" in line for line in lines)
    assert any("2048" in line for line in lines)


def test_only_the_protocol_asked_for_is_named(trained, small):
    result = evaluate(
        restored(trained, small, "evaluate.protocol=uint8"), small / "a.json", say=lambda _: None
    )
    assert list(result["scores"]) == ["uint8"]


def test_without_single_features_precision_and_recall_are_left_out(trained, small, monkeypatch):
    monkeypatch.setattr(job, "read_reference", lambda path: reference(features=False))
    lines = []
    result = evaluate(restored(trained, small), small / "a.json", say=lines.append)
    assert "precision" not in result["scores"]["floats"]
    assert any("no precision and recall" in line for line in lines)


class TestRefusals:
    def test_files_that_are_not_named(self, trained, small):
        with pytest.raises(UserError, match=r"evaluate\.inception and evaluate\.reference must"):
            evaluate(
                restored(trained, small, "evaluate.inception=", "evaluate.reference="),
                small / "a.json",
            )

    def test_a_model_of_token_ids_alone(self, trained, small):
        with pytest.raises(UserError, match="gives token ids, not images"):
            evaluate(restored(trained, small, "tokenizer.name=none"), small / "a.json")
