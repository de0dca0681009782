import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from enat_jax.config import EvaluateConfig
from enat_jax.data.images import ImageConfig, center_crop
from enat_jax.errors import UserError
from enat_jax.evaluation import statistics as job
from enat_jax.evaluation.statistics import read_reference, reference_statistics
from enat_jax.parallel.placement import MeshConfig, Placement
from tests.support.fake_inception import FakeInception, P, Q, use_fake_inception
from tests.support.on_hosts import on_two_hosts


@pytest.fixture
def small(monkeypatch):
    use_fake_inception(monkeypatch.setattr, side=4)


@pytest.fixture
def pictures(tmp_path):
    """Eleven pictures, and the features of each."""
    rng = np.random.default_rng(0)
    crops = []
    for number in range(11):
        file = tmp_path / "pictures" / "ab"[number > 6] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        image.save(file)
        crops.append(center_crop(image, 4) / 255.0)
    return tmp_path / "pictures", FakeInception(4)(jnp.asarray(np.stack(crops), jnp.float32))


def run(folder, out, *, said=None, **images):
    reference_statistics(
        ImageConfig(folder=str(folder), **images), EvaluateConfig(inception="x", batch_size=4),
        out, size=4, placement=Placement.of(MeshConfig()),
        say=([] if said is None else said).append,
    )  # fmt: skip
    with np.load(out) as arrays:
        return dict(arrays)


def test_statistics_are_those_of_all_crops_at_once(small, pictures, tmp_path):
    folder, features = pictures
    arrays = run(folder, tmp_path / "s.npz")
    for name, x in (("", features.pool), ("_s", features.spatial)):
        np.testing.assert_allclose(arrays[f"mu{name}"], x.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(arrays[f"sigma{name}"], np.cov(x, rowvar=False), atol=1e-6)
    np.testing.assert_allclose(arrays["features"], features.pool, rtol=1e-5)
    assert (arrays["images"], arrays["image_size"]) == (11, 4)
    assert arrays["source"] == "folder pictures"
    read = read_reference(tmp_path / "s.npz")
    np.testing.assert_array_equal(read.pool.covariance, arrays["sigma"])
    np.testing.assert_array_equal(read.spatial.mean, arrays["mu_s"])
    np.testing.assert_array_equal(read.features, arrays["features"])


def test_single_features_are_spread_over_the_images(small, pictures, tmp_path, monkeypatch):
    folder, features = pictures
    monkeypatch.setattr(job, "MOST_FEATURES", 4)
    arrays = run(folder, tmp_path / "s.npz")
    np.testing.assert_allclose(arrays["features"], features.pool[np.array([0, 3, 6, 9])], rtol=1e-5)
    assert arrays["images"] == 11


def test_unreadable_images_are_named_and_left_out_up_to_a_share(small, pictures, tmp_path):
    folder, features = pictures
    (folder / "a/02.png").write_bytes(b"")
    said = []
    arrays = run(folder, tmp_path / "s.npz", said=said, max_unreadable=0.1)
    assert any("a/02.png" in line for line in said)
    readable = np.delete(features.pool, 2, 0)
    np.testing.assert_allclose(arrays["mu"], readable.mean(axis=0), rtol=1e-5)
    assert arrays["images"] == 10
    with pytest.raises(UserError, match=r"1 of 11 images are unreadable .*max_unreadable = 0\.01"):
        run(folder, tmp_path / "refused.npz")
    assert not (tmp_path / "refused.npz").exists()


def test_without_weights_the_field_is_named(pictures, tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.inception must name a file"):
        reference_statistics(
            ImageConfig(folder=str(pictures[0])), EvaluateConfig(), tmp_path / "s.npz", size=4,
            placement=Placement.of(MeshConfig()), say=print,
        )  # fmt: skip


TWO_HOSTS = """
import builtins, pathlib
import pytest
import tests.evaluation.test_statistics as t
t.use_fake_inception(builtins.setattr, side=4)
t.job.MOST_FEATURES = 4
folder = pathlib.Path(arguments[0])
def run(out, **images):
    said = []
    t.reference_statistics(
        t.ImageConfig(folder=str(folder / "pictures"), **images),
        t.EvaluateConfig(inception="x", batch_size=2), out, size=4,
        placement=t.Placement.of(t.MeshConfig()), say=said.append)
    return said
elsewhere = folder / f"of_{process}.npz"  # process 0 alone writes
said = run(elsewhere, max_unreadable=0.1)
assert any("a/02.png" in line for line in said) == (process == 0), said  # each names its own
with pytest.raises(t.UserError, match="1 of 11 images are unreadable"):
    run(folder / "refused.npz")
"""


@pytest.mark.slow
def test_two_hosts_have_one_hosts_statistics(small, pictures, tmp_path, monkeypatch):
    folder, _ = pictures
    (folder / "a/02.png").write_bytes(b"")
    monkeypatch.setattr(job, "MOST_FEATURES", 4)
    one = run(folder, tmp_path / "s.npz", max_unreadable=0.1)
    on_two_hosts(TWO_HOSTS, tmp_path)
    assert not (tmp_path / "of_1.npz").exists()
    assert not (tmp_path / "refused.npz").exists()
    with np.load(tmp_path / "of_0.npz") as two:
        assert set(two.files) == set(one)
        for name, array in one.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(two[name], array, rtol=1e-9, atol=1e-12)
            else:
                assert two[name] == array


MEAN, COVARIANCE = np.zeros(P, np.float32), np.eye(P, dtype=np.float32)


@pytest.fixture
def read(small, tmp_path):
    """Reads a file of these arrays."""

    def read(**arrays):
        np.savez(tmp_path / "statistics.npz", **arrays)
        return read_reference(tmp_path / "statistics.npz")

    return read


def test_a_file_of_mu_and_sigma_alone_is_enough(read):
    reference = read(mu=MEAN, sigma=COVARIANCE, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.testing.assert_array_equal(reference.pool.covariance, COVARIANCE)
    assert reference.spatial is reference.features is None


@pytest.mark.parametrize(
    ("arrays", "messages"),
    [
        ({"mu": np.zeros(7), "sigma": np.eye(7)},
         (f"mu is (7,), must be ({P},)", f"sigma is (7, 7), must be ({P}, {P})")),
        ({"mu_s": np.zeros(Q), "sigma_s": np.eye(P)}, (f"must be ({Q}, {Q})",)),
        ({"features": np.zeros((3, Q))}, (f"features is (3, {Q}), must be (3, {P})",)),
        ({"mu": MEAN + np.nan}, ("mu has values that are not finite",)),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_are_named(read, arrays, messages):
    with pytest.raises(UserError, match=r"^reference statistics") as caught:
        read(**{"mu": MEAN, "sigma": COVARIANCE, **arrays})
    for message in messages:
        assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named_in_a_line(read, tmp_path):
    with pytest.raises(UserError, match=r"no sigma among \['mu', 's'\]"):
        read(mu=MEAN, s=np.eye(2))
    with pytest.raises(UserError, match=r"^cannot read reference statistics .*No such file"):
        read_reference(tmp_path / "none.npz")
    torn = tmp_path / "statistics.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(UserError, match=r"^cannot read reference statistics") as caught:
        read_reference(torn)
    assert "\n" not in str(caught.value)
