import dataclasses
import json
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import enat_jax
from enat_jax.__main__ import main
from enat_jax.config import Config, TokenizerConfig, override_config
from enat_jax.convert import published
from enat_jax.convert.published import convert_network, write_checkpoint
from enat_jax.models.import_table import ConvertError
from tests.support.golden import GOLDEN, golden_enat_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOURCE = GOLDEN / "enat/state_dict.safetensors"


@pytest.fixture
def config():
    return Config(model=golden_enat_config(), tokenizer=TokenizerConfig(grid=(8, 8)))


@pytest.fixture
def source(tmp_path):
    """The recorded weights in a folder of their own, where nothing lies beside them."""
    return Path(shutil.copy(SOURCE, tmp_path / "weights.safetensors"))


@pytest.fixture
def recording(golden, tmp_path):
    recorded = golden("enat/forward.npz")
    names = [n for n in recorded if n == "context" or n.startswith("a/half_masked/")]
    np.savez(tmp_path / "few.npz", **{name: recorded[name] for name in names})
    return tmp_path / "few.npz"


def same_leaves(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def refusal(*arguments, **options):
    with pytest.raises(ConvertError) as caught:
        convert_network(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestSizes:
    def test_heads_and_depths_come_from_the_config_beside_the_weights(self):
        config, _ = convert_network(SOURCE)
        assert config.model == golden_enat_config()
        assert config.tokenizer == TokenizerConfig(name="none", grid=(8, 8))

    def test_or_from_the_config_given(self, source, config):
        found, params = convert_network(source, config=config)
        assert found == config
        assert same_leaves(params, convert_network(SOURCE)[1])

    def test_without_either_it_is_said_what_is_missing(self, source):
        message = refusal(source)
        assert "weights do not tell num_heads and enc_dec: give --config" in message
        assert str(source.parent / "config.json") in message

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("{", "JSONDecodeError"),
            ('{"num_heads": 4}', "KeyError: 'enc_dec'"),
            ('{"num_heads": 4, "enc_dec": 3}', "TypeError"),
            ('{"num_heads": 4, "enc_dec": [1, 2, 2]}', "ValueError"),
            ('{"num_heads": "4", "enc_dec": [3, 2]}', "must be whole numbers"),
            ('{"num_heads": 4, "enc_dec": [3, 3]}', "enc_dec = [3, 3], the weights have 5 blocks"),
        ],
    )
    def test_a_wrong_config_beside_is_named(self, source, content, part):
        (source.parent / "config.json").write_text(content)
        message = refusal(source)
        assert str(source.parent / "config.json") in message
        assert part in message

    def test_heads_that_do_not_divide_the_width_are_refused(self, source):
        beside = {"num_heads": 5, "enc_dec": [3, 2]}
        (source.parent / "config.json").write_text(json.dumps(beside))
        with pytest.raises(ValueError, match=r"model.width = 64 must be a multiple"):
            convert_network(source)

    def test_a_config_of_another_model_is_refused_with_every_difference(self, source):
        message = refusal(source, config=override_config({}, ["model.encoder_depth=4"]))
        for part in (
            "model.length = 256, the weights have 64",
            "model.codebook_size = 1024, the weights have 64",
            "model.num_classes = 1000, the weights have 10",
            "model.width = 768, the weights have 64",
        ):
            assert part in message
        assert "encoder_depth" not in message  # 4 + 1 are as many blocks

    def test_a_config_of_other_depth_is_refused(self, source, config):
        deeper = dataclasses.replace(config.model, encoder_depth=4)
        message = refusal(source, config=dataclasses.replace(config, model=deeper))
        assert "encoder_depth + model.decoder_depth = 6, the weights have 5 blocks" in message

    def test_other_weights_are_refused(self, tmp_path):
        save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "w.safetensors")
        assert "these are not ENAT's weights" in refusal(tmp_path / "w.safetensors")


def torch_pickle(arrays):
    """The pickle of a dictionary of float32 tensors, as torch writes it."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    out = b"\x80\x02}("
    for key, (name, array) in enumerate(arrays.items()):
        strides = [stride // 4 for stride in array.strides]
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu")
        storage += b"J" + struct.pack("<i", array.size) + b"tQ"
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00"
        out += numbers(array.shape) + numbers(strides)
        out += b"\x89ccollections\nOrderedDict\n)Rt" + b"R"
    return out + b"u."


def write_torch(path, arrays, entry=None, compression=zipfile.ZIP_STORED):
    """A file as `torch.save` writes it, of a state dict or of one beside a step number."""
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    pickled = torch_pickle(arrays)
    if entry is not None:
        name = b"X" + struct.pack("<I", len(entry)) + entry.encode()
        pickled = b"\x80\x02}(" + name + pickled[2:-1] + b"X\x04\x00\x00\x00stepK\x07u."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("weights/data.pkl", pickled)
        archive.writestr("weights/byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"weights/data/{key}", array.tobytes())
    return path


@pytest.mark.parametrize("entry", [None, "ema"])
def test_a_torch_file_gives_the_same_network(enat_weights, tmp_path, entry):
    path = write_torch(tmp_path / "enat.pth", enat_weights, entry)
    shutil.copy(GOLDEN / "enat/config.json", tmp_path)
    config, params = convert_network(path, key=entry)
    expected_config, expected = convert_network(SOURCE)
    assert config == expected_config
    assert same_leaves(params, expected)


class TestCheckpoint:
    def test_it_loads_as_a_model_with_these_weights(self, tmp_path):
        config, params = convert_network(SOURCE)
        write_checkpoint(config, params, tmp_path / "run")
        model = enat_jax.load(tmp_path / "run", layers="stacked")
        assert model.config == config
        assert same_leaves(model.params, params)
        (tokens,) = model.token_batches([3, 7], steps=2)
        assert tokens.shape == (2, 64)

    def test_checkpoints_that_are_there_are_not_written_over(self, tmp_path):
        config, params = convert_network(SOURCE)
        write_checkpoint(config, params, tmp_path)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        with pytest.raises(ConvertError, match="holds checkpoints already: nothing is written"):
            write_checkpoint(config, params, tmp_path)
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


class TestCommand:
    def convert(self, *arguments, source=SOURCE):
        return main(["convert", "--kind=enat", f"--source={source}", *map(str, arguments)])

    def test_weights_that_replay_their_recordings_are_written(self, recording, tmp_path, capsys):
        code = self.convert(f"--verify={recording}", f"--out={tmp_path / 'run'}")
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].startswith(f"{SOURCE} fits: ENATConfig(name='enat', length=64, ")
        assert lines[1].startswith("ok   a/half_masked floats: largest difference ")
        assert lines[2] == "ok   a/half_masked ids: 0 of 128 differ"
        assert lines[3] == f"wrote the checkpoint to {tmp_path / 'run'}"
        assert (tmp_path / "run/checkpoints/0").is_dir()

    def test_one_perturbed_weight_exits_with_1_and_writes_nothing(
        self, enat_weights, recording, tmp_path, capsys
    ):
        weights = dict(enat_weights)
        weights["blocks.2.mlp.fc1.bias"] = weights["blocks.2.mlp.fc1.bias"] + 0.01
        (tmp_path / "bad").mkdir()
        save_file(weights, tmp_path / "bad/weights.safetensors")
        shutil.copy(GOLDEN / "enat/config.json", tmp_path / "bad")
        code = self.convert(
            f"--verify={recording}", f"--out={tmp_path / 'run'}",
            source=tmp_path / "bad/weights.safetensors",
        )  # fmt: skip
        out, err = capsys.readouterr()
        assert code == 1
        assert "FAIL a/half_masked floats: largest difference " in out
        assert err == "beyond tolerance 5e-05\n"
        assert not (tmp_path / "run").exists()

    def test_a_wider_tolerance_accepts_more(self, recording, monkeypatch, capsys):
        worse = [published.Comparison("a/b/logits", 2e-4, False, 10)]
        monkeypatch.setattr(published, "verify", lambda model, recorded: worse)
        assert self.convert(f"--verify={recording}") == 1
        assert self.convert(f"--verify={recording}", "--tolerance=1e-3") == 0

    @pytest.mark.parametrize("content", [None, b"no zip file", b"PK\x03\x04 damaged", b""])
    def test_a_recording_that_cannot_be_read_is_refused(self, tmp_path, capsys, content):
        if content is not None:
            (tmp_path / "few.npz").write_bytes(content)
        assert self.convert(f"--verify={tmp_path / 'few.npz'}") == 1
        assert capsys.readouterr().err.startswith("enat convert: cannot read the recording ")

    def test_a_missing_source_is_refused_in_one_line(self, tmp_path, capsys):
        assert self.convert(source=tmp_path / "none.pth") == 1
        err = capsys.readouterr().err
        assert str(tmp_path / "none.pth") in err
        assert err.count("\n") == 1
