import json

import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.__main__ import main
from enat_jax.config import config_from_dict
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.errors import UserError
from enat_jax.evaluation import evaluate as job
from enat_jax.evaluation import objective
from enat_jax.evaluation.evaluate import evaluate
from enat_jax.evaluation.frechet import frechet_distance
from enat_jax.evaluation.metric import Scorer
from enat_jax.sampling.sampler import restore, sampler_of
from enat_jax.sampling.strategy_file import write_strategy
from tests.evaluation.test_inception_score import score as inception_score
from tests.support.fake_inception import FakeInception, gaussian, reference, use_fake_inception
from tests.support.on_hosts import on_two_hosts

IMAGES = 23  # in batches of 20 and 3
BATCHED = ("sample.batch_size=4", "evaluate.save_every=8")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder for evaluations with small features; files that are named are there."""
    use_fake_inception(monkeypatch.setattr)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    (tmp_path / "reference.npz").write_bytes(b"statistics")
    return tmp_path


def restored(trained, folder, *overrides):
    mine = [f"evaluate.inception={folder / 'inception.pth'}", f"evaluate.num_images={IMAGES}",
            f"evaluate.reference={folder / 'reference.npz'}", *overrides]  # fmt: skip
    return restore(trained, overrides=lambda fields: config_from_dict(fields, mine))


@pytest.fixture
def run(trained, small):
    """Evaluates into a file of the folder; what is said goes to `lines`."""

    def run(out, *overrides, seed=0, lines=None):
        say = (lambda line: None) if lines is None else lines.append
        return evaluate(restored(trained, small, *overrides), small / out, seed=seed, say=say)

    return run


def test_streamed_scores_are_those_of_all_images_at_once(trained, small, run):
    result = run("fid.json", seed=3)
    sampler = sampler_of(restored(trained, small))
    images = sampler.sample(np.arange(IMAGES) % 10, seed=3).astype(np.float32) / 255
    features = (np.asarray(x, np.float64) for x in FakeInception()(jnp.asarray(images)))
    pool, spatial, logits = features
    mean, spread = inception_score(logits)
    for protocol in ("floats", "uint8"):
        scores = result["scores"][protocol]
        fid = frechet_distance(gaussian(pool), reference().pool)
        assert scores["fid"] == pytest.approx(fid, rel=1e-5)
        sfid = frechet_distance(gaussian(spatial), reference().spatial)
        assert scores["sfid"] == pytest.approx(sfid, rel=1e-5)
        assert scores["inception_score"]["mean"] == pytest.approx(mean, rel=1e-5)
        assert scores["inception_score"]["spread"] == pytest.approx(spread, rel=1e-4)
        assert 0 <= scores["precision"] <= 1
        assert 0 <= scores["recall"] <= 1


def test_the_file_holds_everything_that_determines_the_scores(small, run):
    lines = []
    result = run("new/fid.json", seed=3, lines=lines)
    written = json.loads((small / "new/fid.json").read_text())
    assert written == json.loads(json.dumps(result))
    expected = {"images": IMAGES, "seed": 3, "step": 4, "protocol": "both", "metrics": "inception",
                "reference": "reference.npz"}  # fmt: skip
    assert {name: written[name] for name in expected} == expected
    assert written["strategy"]["steps"] == 2
    digests = ("model_digest", "inception_sha256", "reference_sha256")
    assert [len(written[name]) for name in digests] == [64] * 3
    assert [p.name for p in (small / "new").iterdir()] == ["fid.json"]  # nothing else is left
    assert any(f"FID of {IMAGES} images is biased upwards" in line for line in lines)


class Stopped(Exception):
    pass


def stop(run, out):
    """Evaluates until image 20 of 23, which no save has seen; the last saved is image 16."""
    add, seen = Scorer.add_seen, []

    def stopping(self, looked, class_ids):
        if len(seen) == 9:
            raise Stopped
        seen.append(class_ids)
        add(self, looked, class_ids)

    Scorer.add_seen = stopping
    try:
        with pytest.raises(Stopped):
            run(out)
    finally:
        Scorer.add_seen = add


def test_an_evaluation_that_was_stopped_goes_on_to_the_same_scores(small, run):
    once = run("a.json", *BATCHED)
    stop(lambda out: run(out, *BATCHED), "b.json")
    assert not (small / "b.json").exists()
    lines = []
    assert run("b.json", *BATCHED, lines=lines) == once
    assert "going on from image 16" in lines


# As above on two hosts of two devices each; of several files, process 0 alone may write.
ON_TWO_HOSTS = """
import builtins, json, pathlib
import tests.evaluation.test_evaluate as t
workdir, folder = map(pathlib.Path, arguments)
t.use_fake_inception(builtins.setattr)
run = lambda out, say=print: t.evaluate(t.restored(workdir, folder, *t.BATCHED), out, say=say)
own = folder if process == 0 else folder / "elsewhere"  # hosts need no folder in common
lines = []
t.stop(run, own / "stopped_on_two.json")
done = run(own / "stopped_on_one.json", say=lines.append)
assert ("going on from image 16" in lines) == (process == 0)
with open(f"{folder}/returned.{process}.json", "w") as file:
    json.dump(done, file)
assert own.exists() == (process == 0)
"""


def assert_same_result(file, one):
    """The same but for the order of sums."""
    result, expected = json.loads(file.read_text()), json.loads(json.dumps(one))
    scores, others = expected.pop("scores"), result.pop("scores")
    assert result == expected
    assert others.keys() == scores.keys()
    for protocol, values in scores.items():
        assert others[protocol].keys() == values.keys()
        for name, value in values.items():
            assert others[protocol][name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.slow
def test_two_hosts_have_one_hosts_scores_however_they_were_stopped(trained, small, run):
    one = run("one.json", *BATCHED)
    stop(lambda out: run(out, *BATCHED), "stopped_on_one.json")
    on_two_hosts(ON_TWO_HOSTS, trained, small)
    lines = []
    run("stopped_on_two.json", *BATCHED, lines=lines)
    assert "going on from image 16" in lines
    for name in ("returned.0", "returned.1", "stopped_on_one", "stopped_on_two"):
        assert_same_result(small / f"{name}.json", one)
    assert not list(small.glob("*unfinished*"))


HOSTS_THAT_DISAGREE = """
import builtins, pathlib
import tests.evaluation.test_evaluate as t
workdir, folder = map(pathlib.Path, arguments)
t.use_fake_inception(builtins.setattr)
try:
    t.evaluate(t.restored(workdir, folder), folder / "a.json", seed=process)
except t.UserError as error:
    assert str(error) == "hosts disagree: seed = 0 on process 0, 1 on process 1", error
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_hosts_that_were_asked_for_different_things_are_told_so(trained, small):
    on_two_hosts(HOSTS_THAT_DISAGREE, trained, small)
    assert not (small / "a.json").exists()


def test_an_unfinished_evaluation_of_something_else_is_named(small, run):
    stop(lambda out: run(out, *BATCHED), "a.json")
    with pytest.raises(UserError, match=r"another evaluation \(seed = 1, there 0\): remove it"):
        run("a.json", *BATCHED, seed=1)
    (small / "a.json.unfinished.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read .*a\.json\.unfinished\.npz: .*; remove it"):
        run("a.json", *BATCHED)


def test_images_are_not_lost_where_their_scores_cannot_be_had(run, monkeypatch):
    once = run("a.json")

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "value", None)
        with pytest.raises(TypeError):
            run("b.json")
    monkeypatch.setattr(Scorer, "add_seen", None)  # no image is looked at again
    assert run("b.json") == once


def test_devices_have_the_next_batch_before_one_is_added_up(run, monkeypatch):
    events, add, looks = [], Scorer.add_seen, job._looks

    def asked(*arguments):
        for item in looks(*arguments):
            events.append("ask")
            yield item

    def added(self, looked, class_ids):
        events.append("add")
        add(self, looked, class_ids)

    monkeypatch.setattr(job, "_looks", asked)
    monkeypatch.setattr(Scorer, "add_seen", added)
    run("a.json", "evaluate.protocol=uint8", "sample.batch_size=8")
    assert events == ["ask", "ask", "add", "ask", "add", "add"]


def test_each_protocol_sees_its_own_images(run, monkeypatch):
    both = run("a.json")["scores"]
    monkeypatch.setattr(job, "as_uint8", lambda images: (images > 0.5).astype(jnp.uint8) * 255)
    changed = run("b.json")["scores"]
    assert changed["floats"] == both["floats"]
    assert abs(changed["uint8"]["fid"] - both["uint8"]["fid"]) > 1e-3
    assert run("c.json", "evaluate.protocol=uint8")["scores"] == {"uint8": changed["uint8"]}


def test_what_a_strategy_file_holds_is_written_down(small, run):
    file = small / "strategy.yaml"
    write_strategy(make_strategy(StrategyConfig(steps=2, guidance_scale=3.0)), file)
    result = run("a.json", f"strategy.file={file}", "strategy.rule=file", "evaluate.protocol=uint8")
    assert result["strategy_by_step"]["guidance_scale"] == [0.0, 1.5]


def test_without_single_features_precision_and_recall_are_left_out(run, monkeypatch):
    monkeypatch.setattr(objective, "read_reference", lambda path: reference(features=False))
    lines = []
    assert "precision" not in run("a.json", lines=lines)["scores"]["floats"]
    assert any("no precision and recall" in line for line in lines)


def test_features_that_are_not_finite_end_it(run, monkeypatch):
    monkeypatch.setattr(job, "as_uint8", lambda images: images * np.nan)
    with pytest.raises(UserError, match="features of the first 23 images are infinite or NaN"):
        run("a.json")


def brightness(images, class_ids):
    assert images.shape == (IMAGES, 8, 8, 3)
    return images.mean()


def test_a_users_function_scores_the_images_of_both_protocols(run):
    result = run("a.json", f"evaluate.metrics={__name__}:brightness")
    floats, levels = (result["scores"][name]["brightness"] for name in ("floats", "uint8"))
    assert 0 < floats < 1
    assert floats == pytest.approx(levels / 255, abs=0.01)


def test_the_command_prints_digits_beside_the_real_ones(trained, capsys):
    metrics = ("--config.evaluate.metrics=digits", "--config.evaluate.num_images=20")
    assert main(["evaluate", f"--workdir={trained}", *metrics]) == 0
    first, generated, real, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("20 generated digits: 2 steps in ")
    assert generated.startswith("generated            accuracy 0.")
    assert "   Frechet distance of pixels " in generated
    assert real == "real, half to half   accuracy 0.983   Frechet distance of pixels 16.5"
    scores = json.loads("\n".join(rest))
    assert set(scores) == {"generated", "real"}
    assert scores["generated"]["frechet_distance"] > 100  # hardly trained at all


def test_what_cannot_be_scored_is_refused(trained, small):
    for overrides, message in (
        (["evaluate.inception=", "evaluate.reference="],
         r"^config: evaluate\.inception and evaluate\.reference must name a file, for "),
        (["tokenizer.name=none"], "gives token ids, not images"),
        (["evaluate.metrics=psnr"], "= 'psnr' must be 'inception', 'digits', 'emoji' or"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate(restored(trained, small, *overrides), small / "a.json")
