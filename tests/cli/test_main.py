import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import enat_jax
from enat_jax.__main__ import VERBS, main, summary
from enat_jax.tokenizers.vqgan import VQGANConfig, decode_flops, encode_flops
from enat_jax.tools import bench as bench_module

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def fails(capsys):
    """Runs a command line that must fail; returns its one line without the verb."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        out, err = capsys.readouterr()
        assert "wrote" not in out
        assert err.count("\n") == 1
        assert err.startswith(f"enat {arguments[0]}: ")
        return err.removeprefix(f"enat {arguments[0]}: ").rstrip()

    return run


@pytest.fixture
def sample(trained, tmp_path, capsys):
    """Samples from the tiny run into a file or folder; returns its path."""

    def run(name, *arguments):
        out = tmp_path / name
        assert main(["sample", f"--workdir={trained}", f"--out={out}", *arguments]) == 0
        text, err = capsys.readouterr()
        assert err == ""
        first, last = text.splitlines()
        assert first.startswith("2 steps in 2 compiled bodies, ")
        assert last.startswith("wrote ")
        assert last.endswith(f" images to {out}")
        return out

    return run


class TestHelp:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
    def test_without_a_verb_the_verbs_are_listed(self, capsys, arguments):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name in VERBS:
            assert f"  {name} " in out
            assert summary(name) in out

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_every_verb_lists_its_flags(self, capsys, verb, flag):
        assert main([verb, "--workdir=x", flag]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert out.startswith(f"enat {verb}: {summary(verb)}\n")
        assert "--config.SECTION.FIELD=value overrides a field" in out
        wanted = {"train": "--workdir", "sample": "--per_class", "convert": "--verify",
                  "bench": "--batch_sizes", "tokenize": "--check", "evaluate": "--seed",
                  "statistics": "--size", "train_tokenizer": "--workdir",
                  "compile": "--topology", "search": "--out", "ablate": "--out",
                  "similarity": "--samples"}  # fmt: skip
        assert wanted[verb] in out

    @pytest.mark.parametrize("verb", VERBS)
    def test_verbs_that_run_on_several_hosts_say_how(self, capsys, verb):
        assert main([verb, "--help"]) == 0
        out, _ = capsys.readouterr()
        several = verb in ("train", "train_tokenizer", "tokenize", "statistics", "sample",
                           "evaluate")  # fmt: skip
        for flag in ("coordinator", "num_processes", "process_id", "wait"):
            assert (f"--{flag}:" in out) == several

    def test_an_unknown_verb_is_named_and_the_verbs_are_listed(self, capsys):
        assert main(["trian", "--workdir=x"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("enat: no verb 'trian'\n")
        assert "  train " in err


class TestErrors:
    def test_an_unknown_flag_is_named(self, fails):
        message = fails("train", "--config=configs/digits.py", "--workdri=x")
        assert "workdri" in message

    def test_what_is_no_flag_is_named(self, fails):
        args = ("train", "--config=configs/digits.py", "--workdir=x", "runs/digits", "now")
        assert fails(*args) == "no such argument: runs/digits now"

    @pytest.mark.parametrize(
        ("verb", "flag"),
        [("train", "config"), ("train", "workdir"), ("sample", "workdir"), ("sample", "out"),
         ("convert", "kind"), ("convert", "source"), ("bench", "config")],
    )  # fmt: skip
    def test_a_missing_flag_is_named(self, fails, verb, flag):
        assert f"--{flag}" in fails(verb)

    def test_flags_of_several_hosts_that_say_too_little_are_named(self, fails):
        message = fails("train", "--config=none.py", "--workdir=x", "--coordinator=host:1")
        assert message == "--coordinator=host:1 alone: give --num_processes, --process_id as well"

    def test_a_coordinator_that_cannot_be_reached_is_named_with_the_wait(self):
        done = subprocess.run(
            [sys.executable, "-m", "enat_jax", "train", "--config=none.py", "--workdir=x",
             "--num_processes=2", "--coordinator=nowhere.invalid:1", "--process_id=1", "--wait=1"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        told = [line for line in done.stderr.splitlines() if line.startswith("enat")]
        expected = "enat train: process 1 waited 1 s for process 0 at nowhere.invalid:1: "
        assert len(told) == 1, done.stderr
        assert told[0].startswith(expected)

    def test_an_interrupt_is_a_line_and_130(self, monkeypatch, capsys):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(VERBS["train"], "run", interrupted)
        assert main(["train", "--config=x", "--workdir=x"]) == 130
        assert capsys.readouterr() == ("", "enat train: interrupted\n")

    def test_an_error_that_nobody_foresaw_keeps_its_traceback(self, monkeypatch):
        def broken(*_):
            raise ZeroDivisionError("of our own making")

        monkeypatch.setattr(VERBS["train"], "run", broken)
        with pytest.raises(ZeroDivisionError, match="of our own making"):
            main(["train", "--config=x", "--workdir=x"])

    @pytest.mark.parametrize("verb", ["train", "bench"])
    def test_a_missing_config_file_is_named(self, fails, verb):
        rest = ["--workdir=x"] if verb == "train" else []
        message = fails(verb, "--config=configs/none.py", *rest)
        assert message == "no config file 'configs/none.py'"

    def test_overrides_that_cannot_be_are_all_named(self, fails, tmp_path):
        message = fails(
            "train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}",
            "--config.model.width=63", "--config.train.steps=0",
        )  # fmt: skip
        assert message.startswith("config: ")
        assert "model.width = 63 must be a multiple of model.num_heads = 4" in message
        assert "train.steps = 0 must be at least 1" in message
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("flags", "part"),
        [
            (["--classes=3,11"], "class ids [11] are out of range: 0 to 9, or 10 for any class"),
            (["--classes=3,cat"], "--classes=3,cat: invalid literal"),
            (["--per_class=0"], "per_class"),
            (["--format=gif"], "format"),
            (["--step=3"], "no checkpoint of step 3 in "),
            (["--format=npz"], "must end in .npz for --format=npz"),
            (["--format=tokens"], "must end in .npz for --format=tokens"),
            (["--config.strategy.steps=65"], "strategy.steps = 65 must be between 1 and"),
            (["--config.model.width=32"], "is of another model"),
            (["--config.strategy.rule=file", "--config.strategy.file=none.yaml"], "none.yaml"),
            (["--seed=4294967296"], "seed"),
            (["--seed=-1"], "seed"),
        ],
    )
    def test_samples_that_cannot_be_are_refused(self, fails, trained, tmp_path, flags, part):
        out = tmp_path / "out.png"
        assert part in fails("sample", f"--workdir={trained}", f"--out={out}", *flags)
        assert not out.exists()

    def test_a_missing_run_is_named(self, fails, tmp_path):
        message = fails("sample", f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'x.png'}")
        assert message == f"no checkpoint in {tmp_path / 'none'}"

    def test_a_picture_that_cannot_be_written_is_refused_before_it_is_made(
        self, trained, tmp_path, capsys
    ):
        (tmp_path / "file").touch()
        arguments = ["sample", f"--workdir={trained}", f"--out={tmp_path / 'file' / 'x.png'}"]
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith("enat sample: ")

    @pytest.mark.parametrize(
        ("flags", "part"),
        [
            (["--what=smaple"], "what = smaple, must be one of sample, train, encode, decode"),
            (["--dtypes=float16"], "dtype = float16, must be float32 or bfloat16"),
            (["--batch_sizes=0,1"], "batch size = 0, must be at least 1"),
            (["--batch_sizes=one"], "--batch_sizes=one: invalid literal"),
            (["--repeats=0"], "repeats"),
        ],
    )
    def test_benchmarks_that_cannot_be_are_refused(self, fails, flags, part):
        assert part in fails("bench", "--config=configs/digits.py", *flags)

    def test_an_error_leaves_no_traceback_and_a_code_behind(self):
        done = subprocess.run(
            [sys.executable, "-m", "enat_jax", "train", "--config=none.py", "--workdir=x"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "enat train: no config file 'none.py'\n"


class TestTraining:
    def test_a_run_that_is_done_says_so(self, trained, tiny_overrides, capsys):
        flags = [f"--config.{text}" for text in tiny_overrides]
        assert main(["train", "--config=configs/digits.py", f"--workdir={trained}", *flags]) == 0
        assert capsys.readouterr().out.endswith(" is trained already: 4 of 4 steps\n")

    def test_another_model_is_refused_in_one_line(self, trained, tiny_overrides, fails):
        flags = [f"--config.{text}" for text in tiny_overrides]
        message = fails("train", "--config=configs/digits.py", f"--workdir={trained}", *flags,
                        "--config.model.width=32")  # fmt: skip
        assert "the workdir holds another model: model.width = 32, there 16" in message


class TestSamples:
    def test_a_grid_shows_every_class(self, sample):
        with Image.open(sample("new/grid.png", "--per_class=2")) as grid:
            assert grid.size == (2 * 68 + 4, 10 * (68 + 18))

    def test_single_pngs_are_the_same_pictures(self, sample, trained):
        folder = sample("pngs", "--format=png", "--classes=7,3", "--per_class=2", "--seed=5")
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["00000_class_7.png", "00001_class_7.png", "00002_class_3.png",
                         "00003_class_3.png"]  # fmt: skip
        expected = enat_jax.load(trained).sample([7, 7, 3, 3], seed=5)
        for name, image in zip(names, expected, strict=True):
            with Image.open(folder / name) as file:
                np.testing.assert_array_equal(np.asarray(file), image)

    def test_the_npz_is_the_adm_suites(self, sample, trained):
        path = sample("images.npz", "--format=npz", "--classes=7,10", "--per_class=2")
        with np.load(path) as arrays:
            assert arrays.files == ["arr_0", "arr_1"]
            assert arrays["arr_0"].shape == (4, 8, 8, 3)
            assert arrays["arr_0"].dtype == np.uint8
            np.testing.assert_array_equal(arrays["arr_1"], [7, 7, 10, 10])
            expected = enat_jax.load(trained).sample([7, 7, 10, 10])
            np.testing.assert_array_equal(arrays["arr_0"], expected)

    def test_tokens_are_written_with_their_classes(self, sample):
        path = sample("tokens.npz", "--format=tokens", "--classes=1,2", "--per_class=1")
        with np.load(path) as arrays:
            assert arrays["token_ids"].shape == (2, 64)
            assert arrays["token_ids"].max() < 17
            np.testing.assert_array_equal(arrays["class_ids"], [1, 2])

    @pytest.mark.parametrize("kind", ["grid", "png", "npz", "tokens"])
    def test_of_several_hosts_the_first_alone_writes(
        self, trained, tmp_path, monkeypatch, capsys, kind
    ):
        monkeypatch.setattr("enat_jax.parallel.hosts.speaks", lambda: False)
        out = tmp_path / "made" / "images.npz"
        arguments = [f"--workdir={trained}", f"--out={out}", f"--format={kind}", "--classes=1"]
        assert main(["sample", *arguments, "--per_class=1"]) == 0
        assert capsys.readouterr() == ("", "")
        assert not out.parent.exists()

    def test_overrides_reach_the_strategy(self, trained, tmp_path, capsys):
        arguments = ["sample", f"--workdir={trained}", f"--out={tmp_path / 'x.png'}",
                     "--classes=1", "--per_class=1", "--config.strategy.steps=1"]  # fmt: skip
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("1 steps in 1 compiled bodies")


BENCH_KEYS = {
    "what", "dtype", "batch_size", "gigaflop_per_image", "images_per_second", "seconds",
    "gigaflop_per_second", "of_float32_matmul_rate", "mfu", "compile_seconds",
    "peak_memory_gib", "argument_gib", "output_gib", "temp_gib",
}  # fmt: skip


SMALL_VQGAN = VQGANConfig(4, (1, 1), 1, 4, 8)


class TestBench:
    def test_it_prints_and_writes_json_of_sampling_and_training(
        self, tiny_overrides, tmp_path, monkeypatch, capsys
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
        assert set(train) == BENCH_KEYS | {"remat", "programs", "steps_per_second"}
        assert set(one) == BENCH_KEYS | {"steps", "bodies", "padding"}
        assert (train["what"], train["batch_size"], train["programs"]) == ("train", 8, 2)
        assert (one["what"], one["batch_size"], one["steps"], one["padding"]) == ("sample", 1, 2, 0)
        assert two["batch_size"] == 2
        for case in result["cases"]:
            assert case["seconds"] > 0
            assert case["images_per_second"] == pytest.approx(case["batch_size"] / case["seconds"])
            assert case["gigaflop_per_second"] == pytest.approx(
                case["gigaflop_per_image"] * case["images_per_second"]
            )
            assert case["mfu"] is None  # a CPU's peak is in no data sheet

    def test_flops_are_counted_in_the_papers_unit_too(self, capsys):
        config = "configs/ablations/disentangled_8_8.py"
        assert main(["bench", f"--config={config}", "--what=flops"]) == 0
        (case,) = json.loads(capsys.readouterr().out)["cases"]
        assert case["paper_gigamac_per_image"] == pytest.approx(40.2, rel=0.05)  # the paper's
        # ours runs one branch in the first step, where nothing is guided
        assert 1 < 2 * case["paper_gigamac_per_image"] / case["gigaflop_per_image"] < 1.1

    def test_a_vqgan_is_measured_both_ways_at_the_configs_grid(self, monkeypatch, capsys):
        monkeypatch.setattr(bench_module, "_MATMUL", 64)
        monkeypatch.setattr(bench_module, "VQGANConfig", lambda: SMALL_VQGAN)
        code = main(["bench", "--config=configs/photos.py", "--what=encode,decode",
                     "--batch_sizes=2", "--repeats=1", "--config.tokenizer.weights=nowhere",
                     "--config.model.num_classes=2", "--config.model.codebook_size=8"])  # fmt: skip
        cases = json.loads(capsys.readouterr().out)["cases"]
        assert code == 0
        assert [case["what"] for case in cases] == ["encode", "decode"]
        for case, flops in zip(cases, (encode_flops, decode_flops), strict=True):
            assert set(case) == BENCH_KEYS | {"pixels"}
            assert case["pixels"] == 16
            assert case["gigaflop_per_image"] == pytest.approx(flops(SMALL_VQGAN, 16) / 1e9)
