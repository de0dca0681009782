import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from enat_jax.errors import UserError
from enat_jax.evaluation.moments import Moments, across_hosts, scores_across_hosts, sum_across_hosts
from enat_jax.evaluation.scores import ScoreSums

EXACT = 1e-10
UNEVEN = [(5, 1, 40, 0, 54), (100,), (1,) * 100, (33, 33, 34)]


def features(seed=0, count=100, width=7):
    """Correlated features, far from zero: sums of squares would lose six digits of them."""
    rng = np.random.default_rng(seed)
    return (1000 + rng.normal(size=(count, width)) @ rng.normal(size=(width, width))).astype(
        np.float32
    )


def assert_moments_of(moments, x):
    x = x.astype(np.float64)
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=EXACT)
    covariance = np.cov(x, rowvar=False)
    limit = EXACT * np.abs(covariance).max()
    np.testing.assert_allclose(moments.covariance(), covariance, rtol=0, atol=limit)


def streamed(x, sizes):
    moments = Moments.empty(x.shape[1])
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        moments = moments.add(part)
    return moments


@pytest.mark.parametrize("sizes", UNEVEN)
def test_uneven_batches_give_the_moments_of_the_whole(sizes):
    x = features()
    assert sum(sizes) == len(x)
    assert_moments_of(streamed(x, sizes), x)


def test_merged_moments_are_those_of_both_sets():
    x = features()
    parts = [streamed(part, [len(part)]) for part in np.split(x, [10, 11, 80])]
    first, second, third, fourth = parts
    assert_moments_of(first.merge(second).merge(third.merge(fourth)), x)
    assert_moments_of(Moments.empty(7).merge(fourth).merge(Moments.empty(7)), x[80:])


def test_moments_that_are_added_to_stay_as_they_were():
    x = features()
    before = streamed(x[:50], [50])
    before.add(x[50:])
    assert_moments_of(before, x[:50])
    assert_moments_of(before.add(x[:0]), x[:50])


def test_features_that_are_added_stay_as_they_were():
    x = features().astype(np.float64)
    kept = x.copy()
    streamed(x, [100])
    np.testing.assert_array_equal(x, kept)


def test_moments_come_back_from_a_file_to_the_last_bit(tmp_path):
    x = features()
    half = streamed(x[:50], [50])
    np.savez(tmp_path / "half.npz", **half.as_arrays())
    again = Moments.from_arrays(np.load(tmp_path / "half.npz"))
    np.testing.assert_array_equal(again.add(x[50:]).covariance(), half.add(x[50:]).covariance())
    assert again.count == 50


def test_a_covariance_needs_two_images():
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        Moments.empty(7).add(features(count=1)).covariance()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(wrong):
    x = features()
    x[3, 2] = x[3, 4] = x[70, 0] = wrong
    with pytest.raises(UserError, match="features of 2 of 100 images are infinite or NaN"):
        Moments.empty(7).add(x)


def test_one_host_alone_keeps_its_sums():
    moments = streamed(features(), [100])
    assert across_hosts(moments) is moments
    array = np.arange(3)
    assert sum_across_hosts(array) is array


def run(code, *arguments, devices=1):
    """Starts a program on as many devices of the CPU."""
    env = {
        "PYTHONPATH": ".",
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def assert_succeeds(process):
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors


ONE_THREE_AND_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from enat_jax.evaluation.moments import Moments
x = np.load(sys.argv[1])
for count in (1, 3, 8):
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
    spread = lambda part: jax.device_put(part, jax.sharding.NamedSharding(mesh, P("data")))
    moments = Moments.empty(x.shape[1])
    for start, end in ((0, 24), (24, 72), (72, 96)):
        part = spread(x[start:end])
        assert len(part.addressable_shards) == count
        moments = moments.add(part)
    moments = moments.add(x[96:])
    np.savez(sys.argv[2].format(count), **moments.as_arrays())
"""


def test_moments_from_one_three_and_eight_devices_are_those_of_the_whole(tmp_path):
    x = features()
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "{}.npz"
    assert_succeeds(run(ONE_THREE_AND_EIGHT_DEVICES, tmp_path / "x.npy", out, devices=8))
    for count in (1, 3, 8):
        assert_moments_of(Moments.from_arrays(np.load(str(out).format(count))), x)


TWO_HOSTS = """
import sys
import jax, numpy as np
port, process, source, out = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
from jax.sharding import NamedSharding, PartitionSpec as P
from enat_jax.evaluation import moments as m
from enat_jax.evaluation.scores import ScoreSums
m.PIECE_BYTES = 64  # several pieces of even a small scatter
x = np.load(source)
mesh = jax.make_mesh((6,), ("data",))
index = np.arange(96)
spread = lambda array: jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, P("data")), lambda where: array[where])
features, indices = m.local_rows(spread(x[:96])), m.local_rows(spread(index))
np.testing.assert_array_equal(indices, index[48 * int(process):][:48])  # in their order
np.testing.assert_array_equal(features, x[indices])  # rows of the same images
moments = m.Moments.empty(x.shape[1]).add(spread(x[:96]))
sums = ScoreSums.empty(100, x.shape[1]).add(features - 1000, indices)
if process == "1":  # images that one host alone has
    moments = moments.add(x[96:])
    sums = sums.add(x[96:] - 1000, np.arange(96, 100))
replicated = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda where: x[where])
assert len(m.local_rows(replicated)) == (100 if process == "0" else 0)  # counted once
assert m.across_hosts(m.Moments.empty(3)).count == 0
np.savez(out, local=moments.count, **m.across_hosts(moments).as_arrays())
np.savez(out + "_scores", **m.scores_across_hosts(sums).as_arrays())
"""


def test_moments_and_score_sums_of_two_hosts_are_those_of_the_whole(tmp_path):
    x = features()
    np.save(tmp_path / "x.npy", x)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [
        run(TWO_HOSTS, port, process, tmp_path / "x.npy", tmp_path / str(process), devices=3)
        for process in range(2)
    ]
    for process in both:
        assert_succeeds(process)
    first, second = (dict(np.load(tmp_path / f"{process}.npz")) for process in range(2))
    assert (first.pop("local"), second.pop("local")) == (48, 52)
    assert_moments_of(Moments.from_arrays(first), x)
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)
    whole = ScoreSums.empty(100, 7).add(x - 1000, np.arange(100))
    for process in range(2):
        sums = ScoreSums.from_arrays(np.load(tmp_path / f"{process}_scores.npz"))
        assert sums.score() == pytest.approx(whole.score(), rel=EXACT)


def test_one_host_alone_keeps_its_score_sums():
    whole = ScoreSums.empty(100, 7).add(features() - 1000, np.arange(100))
    assert scores_across_hosts(whole).score() == whole.score()
