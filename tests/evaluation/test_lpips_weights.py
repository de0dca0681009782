import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from enat_jax.evaluation.lpips import LPIPS
from enat_jax.evaluation.lpips_weights import load_lpips, lpips_from, rules
from enat_jax.models.import_table import ConvertError

WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512,
          24: 512, 26: 512, 28: 512}  # fmt: skip


@pytest.fixture
def weights():
    """Tensors of the published names and shapes that take no memory."""
    shapes, before = {"classifier.0.weight": (4096, 25088), "classifier.0.bias": (4096,)}, 3
    for layer, width in WIDTHS.items():
        shapes[f"features.{layer}.weight"] = (width, before, 3, 3)
        shapes[f"features.{layer}.bias"] = (width,)
        before = width
    for stage, width in enumerate((64, 128, 256, 512, 512)):
        shapes[f"lin{stage}.model.1.weight"] = (1, width, 1, 1)
    return {name: np.broadcast_to(np.float32(0.5), shape) for name, shape in shapes.items()}


def refusal(weights):
    with pytest.raises(ConvertError) as caught:
        lpips_from(weights)
    return str(caught.value)


def test_the_published_tensors_fill_the_network(weights):
    network = lpips_from(weights)
    assert network.stages[4][2].kernel.shape == (3, 3, 512, 512)
    assert float(network.weights[3][...][7]) == 0.5
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(network))]
    assert sorted(rule.target for rule in rules()) == sorted(paths)


def test_kernels_are_turned_window_first():
    rule = next(rule for rule in rules() if rule.source == "features.5.weight")
    weight = np.random.default_rng(0).normal(size=(128, 64, 3, 3))
    assert rule.transform(weight)[2, 1, 7, 100] == weight[100, 7, 2, 1]


def test_what_is_missing_extra_or_misshapen_is_named(weights):
    del weights["features.14.bias"], weights["lin2.model.1.weight"]
    weights["features.30.weight"] = weights["features.28.weight"]
    weights["features.0.weight"] = weights["features.0.weight"][:, :1]
    message = refusal(weights)
    assert "2 missing: features.14.bias, lin2.model.1.weight" in message
    assert "1 extra: features.30.weight" in message
    assert "1 misshapen: features.0.weight (64, 1, 3, 3) for stages.0.0.kernel" in message


def test_the_two_published_files_are_read_as_one(tmp_path):
    for name in ("features.0.bias", "lin0.model.1.weight"):
        file = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file({name: np.zeros((1, 64, 1, 1), np.float32)}, file)
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(ConvertError) as caught:
        load_lpips(paths)
    assert "features.0.bias.safetensors" in str(caught.value)
    assert "lin0.model.1.weight.safetensors: the weights do not fit" in str(caught.value)
    missing = str(caught.value).partition("missing: ")[2].partition(";")[0].split(", ")
    assert len(missing) == 13 * 2 + 5 - 2  # all but the two
    with pytest.raises(ConvertError, match=r"features.0.bias are in another file as well"):
        load_lpips([paths[0], paths[0]])


def test_files_that_do_not_fit_are_named(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ConvertError, match=r"a.safetensors: the weights do not fit.*1 extra: a"):
        load_lpips([tmp_path / "a.safetensors"])


def test_the_network_is_vgg16():
    size = sum(leaf.size for leaf in nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))))
    )["stages"][0][0].values())  # fmt: skip
    assert size == 3 * 3 * 3 * 64 + 64
