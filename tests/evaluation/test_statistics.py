import numpy as np
import pytest
from PIL import Image

from enat_jax.config import EvaluateConfig
from enat_jax.data.images import ImageConfig, center_crop
from enat_jax.errors import UserError
from enat_jax.evaluation import statistics as job
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.evaluation.statistics import reference_statistics
from enat_jax.parallel.placement import MeshConfig, Placement
from tests.support.on_hosts import on_two_hosts

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, Q = 12, 5


class FakeInception(Inception):
    """Means over rows and columns in place of Inception's features."""

    def __init__(self):
        pass

    def __call__(self, images):
        rows, columns = images.mean(axis=2), images.mean(axis=1)  # 4 pixels, 3 channels each
        pool = rows.reshape(len(images), -1)
        return Features(pool, columns.reshape(len(images), -1)[:, :Q], pool)


def patch(setattr):
    """Puts small features in the place of Inception's."""
    setattr(job, "POOL_FEATURES", P)
    setattr(job, "SPATIAL_FEATURES", Q)
    setattr(job, "load_inception", lambda path, digest: FakeInception())


@pytest.fixture
def small(monkeypatch):
    patch(monkeypatch.setattr)


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
    features = np.stack(crops).mean(axis=2).reshape(11, -1)
    return tmp_path / "pictures", features


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
    found = run(folder, tmp_path / "s.npz")
    np.testing.assert_allclose(found["mu"], features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["sigma"], np.cov(features, rowvar=False), atol=1e-7)
    np.testing.assert_allclose(found["features"], features, rtol=1e-6)
    assert found["mu_s"].shape == (Q,)
    assert found["sigma_s"].shape == (Q, Q)
    assert found["images"] == 11
    assert found["image_size"] == 4


def test_single_features_are_spread_over_the_images(small, pictures, tmp_path, monkeypatch):
    folder, features = pictures
    monkeypatch.setattr(job, "MOST_FEATURES", 4)
    found = run(folder, tmp_path / "s.npz")
    np.testing.assert_allclose(found["features"], features[[0, 3, 6, 9]], rtol=1e-6)
    assert found["images"] == 11


def test_an_unreadable_image_is_named_and_left_out(small, pictures, tmp_path):
    folder, features = pictures
    (folder / "a/02.png").write_bytes(b"")
    said = []
    found = run(folder, tmp_path / "s.npz", said=said, max_unreadable=0.1)
    assert any("a/02.png" in line for line in said)
    np.testing.assert_allclose(found["mu"], np.delete(features, 2, 0).mean(axis=0), rtol=1e-6)
    assert found["images"] == 10


def test_too_many_unreadable_images_leave_nothing_behind(small, pictures, tmp_path):
    folder, _ = pictures
    (folder / "a/02.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 11 images are unreadable .*max_unreadable = 0\.01"):
        run(folder, tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()


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
from enat_jax.errors import UserError
t.patch(builtins.setattr)
t.job.MOST_FEATURES = 4
folder = pathlib.Path(arguments[0])
def run(out, **images):
    said = []
    t.reference_statistics(
        t.ImageConfig(folder=str(folder / "pictures"), **images),
        t.EvaluateConfig(inception="x", batch_size=4), out, size=4,
        placement=t.Placement.of(t.MeshConfig()), say=said.append)
    return said
elsewhere = folder / f"of_{process}.npz"  # process 0 alone writes
said = run(elsewhere, max_unreadable=0.1)
assert any("a/02.png" in line for line in said) == (process == 0), said  # each names its own
with pytest.raises(UserError, match="1 of 11 images are unreadable"):
    run(folder / "refused.npz")
"""


def test_two_hosts_find_one_hosts_statistics(small, pictures, tmp_path, monkeypatch):
    folder, _ = pictures
    (folder / "a/02.png").write_bytes(b"")
    monkeypatch.setattr(job, "MOST_FEATURES", 4)
    one = run(folder, tmp_path / "s.npz", max_unreadable=0.1)
    on_two_hosts(TWO_HOSTS, tmp_path)
    assert not (tmp_path / "of_1.npz").exists()
    assert not (tmp_path / "refused.npz").exists()
    with np.load(tmp_path / "of_0.npz") as found:
        assert set(found.files) == set(one)
        for name, array in one.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-12)
            else:
                assert found[name] == array
