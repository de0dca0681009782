import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from enat_jax.__main__ import main
from enat_jax.tokenizers.config import VQGANConfig
from enat_jax.tokenizers.vqgan import abstract_vqgan
from enat_jax.tools import bench as bench_module

BENCH_KEYS = {
    "what", "dtype", "batch_size", "gigaflop_per_image", "images_per_second", "seconds",
    "gigaflop_per_second", "of_float32_matmul_rate", "mfu", "compile_seconds",
    "peak_memory_gib", "argument_gib", "output_gib", "temp_gib",
}  # fmt: skip
SMALL_VQGAN = VQGANConfig(4, (1, 1), 1, 4, 8)
GRID = (8, 8)  # the config's


def test_it_prints_and_writes_json_of_sampling_and_training(
    tiny_overrides, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench_module, "_MATMUL", 64)
    code = main(["bench", "--config=configs/digits.py", "--what=train,sample",
                 "--batch_sizes=1,2", "--repeats=1", f"--out={tmp_path / 'bench.json'}",
                 *(f"--config.{text}" for text in tiny_overrides)])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0
    result = json.loads(out)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert set(result) == {"device", "devices", "machine", "jax", "parameters", "cases"}
    assert result["parameters"] == 15906
    train, one, two = result["cases"]
    assert len(err.splitlines()) == 3  # a line per case
    assert set(train) == BENCH_KEYS | {"remat", "programs", "padding", "steps_per_second"}
    assert set(one) == BENCH_KEYS | {"steps", "bodies", "padding"}
    assert (train["what"], train["batch_size"], train["programs"]) == ("train", 8, 2)
    assert train["padding"] == 0
    assert (one["what"], one["batch_size"], one["steps"], one["padding"]) == ("sample", 1, 2, 0)
    assert two["batch_size"] == 2
    for case in result["cases"]:
        assert case["seconds"] > 0
        assert case["images_per_second"] == pytest.approx(case["batch_size"] / case["seconds"])
        assert case["gigaflop_per_second"] == pytest.approx(
            case["gigaflop_per_image"] * case["images_per_second"]
        )
        assert case["mfu"] is None  # a CPU's peak is in no data sheet


def test_flops_are_counted_in_the_papers_unit_too(capsys):
    config = "configs/ablations/disentangled_8_8.py"
    assert main(["bench", f"--config={config}", "--what=flops"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["paper_gigamac_per_image"] == pytest.approx(40.2, rel=0.05)  # the paper's
    # ours runs one branch in the first step, where nothing is guided
    assert 1 < 2 * case["paper_gigamac_per_image"] / case["gigaflop_per_image"] < 1.1


def test_a_vqgan_is_measured_both_ways_at_the_configs_grid(monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "_MATMUL", 64)
    monkeypatch.setattr(bench_module, "VQGANConfig", lambda: SMALL_VQGAN)
    code = main(["bench", "--config=configs/photos.py", "--what=encode,decode",
                 "--batch_sizes=2", "--repeats=1", "--config.tokenizer.weights=nowhere",
                 "--config.model.num_classes=2", "--config.model.codebook_size=8"])  # fmt: skip
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert code == 0
    assert [case["what"] for case in cases] == ["encode", "decode"]
    graphdef, params = abstract_vqgan(SMALL_VQGAN)
    one = {
        "encode": (lambda model, x: model.encode(x), jnp.ones((1, 16, 16, 3))),
        "decode": (lambda model, x: model.decode(x, GRID), jnp.zeros((1, GRID[0] * GRID[1]), int)),
    }
    for case in cases:
        assert set(case) == BENCH_KEYS | {"pixels"}
        assert case["pixels"] == 16
        code, data = one[case["what"]]
        lowered = jax.jit(lambda w, x, f=code: f(nnx.merge(graphdef, w), x)).lower(params, data)
        flops = lowered.cost_analysis()["flops"]
        assert case["gigaflop_per_image"] == pytest.approx(flops / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--what=smaple", "what = smaple, must be one of sample, train, encode, decode"),
        ("--dtypes=float16", "dtype = float16, must be float32 or bfloat16"),
        ("--batch_sizes=0,1", "batch size = 0, must be at least 1"),
        ("--batch_sizes=one", "--batch_sizes=one: invalid literal"),
        ("--repeats=0", "repeats"),
    ],
)
def test_benchmarks_that_cannot_be_are_refused(capsys, flag, part):
    assert main(["bench", "--config=configs/digits.py", flag]) == 1
    assert part in capsys.readouterr().err
