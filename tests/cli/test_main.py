import pathlib
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

import enat_jax
from enat_jax import cli
from enat_jax.__main__ import VERBS, main


def failing(kind):
    """A function that raises."""

    def fail(*_):
        raise kind

    return fail


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

    def run(name, *arguments, steps=2):
        out = tmp_path / name
        arguments = [*arguments, f"--config.strategy.steps={steps}"]
        assert main(["sample", f"--workdir={trained}", f"--out={out}", *arguments]) == 0
        text, err = capsys.readouterr()
        assert err == ""
        first, last = text.splitlines()
        assert first.startswith(f"{steps} steps in {steps} compiled bodies, ")
        assert last.startswith("wrote ")
        assert last.endswith(f" images to {out}")
        return out

    return run


class TestFrontDoor:
    @pytest.mark.parametrize("code", [
        "import enat_jax; enat_jax.__version__",
        *(f"from enat_jax.__main__ import main; main({arguments})"
          for arguments in (["--help"], ["--version"], ["train", "--help"])),
    ])  # fmt: skip
    def test_looking_in_imports_no_library_that_takes_long(self, code):
        heavy = {"jax", "numpy", "scipy", "grain", "orbax", "tensorflow_datasets", "matplotlib"}
        code += f"; import sys; print({heavy} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.endswith("set()\n"), done.stdout + done.stderr

    def test_the_version_is_the_installed_ones_or_unknown(self, monkeypatch, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"enat_jax {metadata.version('enat_jax')}\n"
        monkeypatch.setattr(metadata, "version", failing(metadata.PackageNotFoundError))
        assert enat_jax.__version__ == "0+unknown"

    def test_what_the_package_has_not_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'laod'"):
            _ = enat_jax.laod

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"], ["trian"]])
    def test_without_a_verb_the_verbs_are_listed(self, capsys, arguments):
        unknown = "enat: no verb 'trian'\n" if arguments == ["trian"] else ""
        assert main(arguments) == (2 if unknown else 0)
        shown, silent = capsys.readouterr()[:: -1 if unknown else 1]
        assert silent == ""
        assert shown.startswith(f"{unknown}usage: enat VERB")
        assert all(f"  {name} " in shown and does in shown for name, does in VERBS.items())

    def test_every_verb_has_a_module_and_every_module_a_verb(self):
        shared = {"__init__", "host_flags", "shared_flags"}
        modules = {path.stem for path in pathlib.Path(cli.__file__).parent.glob("*.py")}
        assert modules - shared == set(VERBS)

    @pytest.mark.parametrize(("verb", "flags"), {
        "train": "config workdir process_id", "train_tokenizer": "config workdir coordinator",
        "sample": "workdir out per_class wait", "evaluate": "workdir seed num_processes",
        "tokenize": "config check wait", "statistics": "config size wait",
        "convert": "kind source verify", "search": "config workdir out step",
        "ablate": "config workdir out", "similarity": "workdir out samples",
        "bench": "config batch_sizes", "compile": "config topology out",
    }.items())  # fmt: skip
    def test_a_verb_lists_its_flags_and_those_of_several_hosts_where_it_takes_them(
        self, capsys, verb, flags
    ):
        for argument in ("-h", "--help"):
            assert main([verb, "--workdir=x", argument]) == 0
            out, err = capsys.readouterr()
            assert err == ""
            assert out.startswith(f"enat {verb}: {VERBS[verb]}\n")
            assert "--config.SECTION.FIELD=value overrides a field" in out
            assert all(f"--{flag}:" in out for flag in flags.split())
            several = flags.split()[-1] in ("coordinator", "num_processes", "process_id", "wait")
            assert ("--coordinator:" in out) == several


TRAIN = ["train", "--config=configs/digits.py", "--workdir=x"]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ([*TRAIN, "--wrokdir=x"], "wrokdir"),
            ([*TRAIN, "runs/digits", "now"], "no such argument: runs/digits now"),
            (["train"], "--workdir"),
            (["sample", "--out=x"], "--workdir"),
            (["convert", "--kind=enat"], "--source"),
            (["bench"], "--config"),
            (["bench", "--config=configs/none.py"], "no config file 'configs/none.py'"),
            ([*TRAIN, "--coordinator=host:1"],
             "--coordinator=host:1 --num_processes=None --process_id=None: "),
            (["sample", "--workdir=none", "--out=x.png"], "no checkpoint in "),
            (["train", "--config=configs/digits.py", "--workdir="], "--workdir= is empty"),
            (["train", "--config=configs/digits.py", "--workdir", ""], "--workdir= is empty"),
            (["bench", "--config=configs/digits.py", "--what="], "--what= is empty"),
            (["bench", "--config=configs/digits.py", "--what=flops", "--batch_sizes=4294967296"],
             "--batch_sizes=4294967296: 4294967296 must be below 2**31"),
            (["bench", "--config=configs/digits.py", f"--repeats={10**30}"], "--repeats"),
            (["bench", "--config=configs/digits.py", "--config.model.attention=cudnn",
              "--config.model.dtype=bfloat16"], "model.attention = 'cudnn' needs an NVIDIA GPU"),
            ([*TRAIN, "--coordinator=localhost:99999", "--num_processes=2", "--process_id=1"],
             "--coordinator=localhost:99999, must be host:port, a port from 1 to 65535"),
            ([*TRAIN, f"--wait={10**30}"], "--wait"),
            (["convert", "--kind=enat", "--source=x", "--tolerance=inf"], "tolerance"),
            (["bench", "--config=a\x1b[2J\udcff.py"], r"no config file 'a\x1b[2J\udcff.py'"),
            (["bench", "--config=configs/digits.py", "--what=\x1b[2J"], r"what = \x1b[2J, must"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_asked_is_named(self, fails, arguments, part):
        assert part in fails(*arguments)

    def test_an_interrupt_is_a_line_and_130(self, monkeypatch, capsys):
        monkeypatch.setattr("enat_jax.cli.train.run", failing(KeyboardInterrupt))
        assert main(TRAIN) == 130
        assert capsys.readouterr() == ("", "enat train: interrupted\n")

    @pytest.mark.parametrize("kind", [MemoryError("12"), RuntimeError("RESOURCE_EXHAUSTED: 12")])
    def test_memory_that_ends_is_a_line(self, monkeypatch, fails, kind):
        monkeypatch.setattr("enat_jax.cli.train.run", failing(kind))
        assert fails(*TRAIN) == f"out of memory: {kind}"

    def test_an_error_that_nobody_foresaw_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr("enat_jax.cli.train.run", failing(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            main(TRAIN)

    def test_an_error_leaves_no_traceback_and_a_code_behind(self):
        done = subprocess.run(
            [sys.executable, "-m", "enat_jax", "bench", "--config=none.py"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "enat bench: no config file 'none.py'\n"

    def test_overrides_that_cannot_be_are_all_named(self, fails, tmp_path):
        run = tmp_path / "run"
        message = fails("train", "--config=configs/digits.py", f"--workdir={run}",
                        "--config.model.width=63", "--config.train.steps=0")  # fmt: skip
        assert message == ("config: model.width = 63 must be a multiple of model.num_heads = 4;"
                           " train.steps = 0 must be at least 1")  # fmt: skip
        assert not run.exists()

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
            (
                ["--per_class=1000000000"],
                "10 classes x --per_class=1000000000 = 10000000000 images",
            ),
            (["--classes=9223372036854775808"], "must be below 2**31"),
        ],
    )
    def test_samples_that_cannot_be_are_refused(self, fails, trained, tmp_path, flags, part):
        out = tmp_path / "out.png"
        assert part in fails("sample", f"--workdir={trained}", f"--out={out}", *flags)
        assert not out.exists()

    def test_a_picture_that_cannot_be_written_is_refused_before_it_is_made(
        self, fails, trained, tmp_path
    ):
        (tmp_path / "file").touch()
        fails("sample", f"--workdir={trained}", f"--out={tmp_path / 'file' / 'x.png'}")


class TestTraining:
    def test_a_run_that_is_done_is_left_and_another_model_refused(
        self, trained, tiny_overrides, fails, capsys
    ):
        command = ["train", "--config=configs/digits.py", f"--workdir={trained}",
                   *(f"--config.{text}" for text in tiny_overrides)]  # fmt: skip
        assert main(command) == 0
        assert capsys.readouterr().out.endswith(" is trained already: 4 of 4 steps\n")
        message = fails(*command, "--config.model.width=32")
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

    def test_tokens_are_written_with_their_classes_and_overrides_reach_the_strategy(self, sample):
        flags = ("--format=tokens", "--classes=1,2", "--per_class=1")
        path = sample("tokens.npz", *flags, steps=1)
        with np.load(path) as arrays:
            assert arrays["token_ids"].shape == (2, 64)
            assert arrays["token_ids"].max() < 17
            np.testing.assert_array_equal(arrays["class_ids"], [1, 2])

    @pytest.mark.parametrize("kind", ["grid", "tokens"])
    def test_of_several_hosts_the_first_alone_writes(
        self, trained, tmp_path, monkeypatch, capsys, kind
    ):
        monkeypatch.setattr("enat_jax.parallel.hosts.is_primary", lambda: False)
        out = tmp_path / "made" / "images.npz"
        arguments = [f"--workdir={trained}", f"--out={out}", f"--format={kind}", "--classes=1"]
        assert main(["sample", *arguments, "--per_class=1"]) == 0
        assert capsys.readouterr() == ("", "")
        assert not out.parent.exists()
