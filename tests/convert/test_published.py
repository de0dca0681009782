"""From published weights to a checkpoint, and the command that does it."""

import dataclasses
import functools
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from safetensors.numpy import save_file

import enat_jax
from enat_jax.__main__ import main
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import load_vqgan
from enat_jax.config import Config, TokenizerConfig
from enat_jax.convert import published
from enat_jax.convert.published import KINDS, read_vqgan, write_checkpoint
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.tokenizers.vqgan import VQGANConfig
from tests.support.golden import GOLDEN, golden_enat_config
from tests.support.imports import RECORDED_VQGAN, published_vqgan, recorded
from tests.support.recorded_autonat import recorded_config
from tests.support.torch_file import save_arrays

SOURCES = {name: GOLDEN / f"{name}/state_dict.safetensors" for name in ("enat", "autonat")}
CONFIGS = {
    name: Config(model=model, tokenizer=TokenizerConfig(grid=(8, 8)))
    for name, model in {"enat": golden_enat_config(), "autonat": recorded_config()}.items()
}
BESIDE = {"enat": {"num_heads": 4, "enc_dec": [3, 2]}, "autonat": {"num_heads": 4}}
both = pytest.mark.parametrize("name", SOURCES)


def read(name, source, **how):
    return KINDS[name].read(source, **how)


@pytest.fixture
def alone(tmp_path):
    """Recorded weights in a folder of their own, where nothing lies beside them."""
    return lambda name: Path(shutil.copy(SOURCES[name], tmp_path / "weights.safetensors"))


@pytest.fixture(scope="module")
def vqgan_source(tmp_path_factory):
    path = tmp_path_factory.mktemp("vqgan") / "vqgan.safetensors"
    save_file(recorded("vqgan").weights, path)
    return path


def same_leaves(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def refusal(name, source, **how):
    with pytest.raises(UserError) as caught:
        read(name, source, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTokenNetworks:
    @both
    def test_what_weights_do_not_tell_comes_from_the_config_beside_them(self, name):
        config = read(name, SOURCES[name]).metadata["config"]
        assert config["model"] == dataclasses.asdict(CONFIGS[name].model)
        assert config["tokenizer"] == dataclasses.asdict(TokenizerConfig("none", (8, 8)))
        autonat = name == "autonat"
        assert config["train"]["mean_over"] == ("tokens" if autonat else "images")
        assert config["strategy"]["masking"] == ("autonat" if autonat else "enat")

    @both
    def test_or_from_the_config_given(self, alone, name):
        imported = read(name, alone(name), config=CONFIGS[name])
        assert imported.metadata["config"] == dataclasses.asdict(CONFIGS[name])
        assert same_leaves(nnx.state(imported.model), nnx.state(read(name, SOURCES[name]).model))

    @both
    def test_without_either_it_is_told_what_is_missing(self, alone, name):
        source = alone(name)
        needed = " and ".join(BESIDE[name])
        assert refusal(name, source) == (
            f"{source}: weights do not tell {needed}: give --config, or put {needed} into"
            f" {source.parent / 'config.json'}"
        )

    @pytest.mark.parametrize(
        ("name", "content", "part"),
        [
            ("enat", "{", "config.json: JSONDecodeError"),
            ("enat", "[" * 100_000, "config.json: ValueError: is nested deeper than 64"),
            ("enat", '{"num_heads": 4}', "config.json: KeyError: 'enc_dec'"),
            ("enat", '{"num_heads": 4, "enc_dec": 3}', "config.json: ValueError"),
            ("enat", '{"num_heads": 4, "enc_dec": [1, 2, 2]}', "config.json: ValueError"),
            ("enat", '{"num_heads": "4", "enc_dec": [3, 2]}', "model.num_heads = '4' must be of"),
            ("enat", '{"num_heads": 5, "enc_dec": [3, 2]}', "model.width = 64 must be a multiple"),
            ("enat", '{"num_heads": 4, "enc_dec": [3, 3]}',
             "model.encoder_depth + model.decoder_depth = 6, the weights have 5"),
            ("autonat", "{}", "config.json: KeyError: 'num_heads'"),
            ("autonat", '{"num_heads": [4, 4]}', "config.json: ValueError"),
            ("autonat", "[]", "config.json: TypeError"),
        ],
    )  # fmt: skip
    def test_a_wrong_config_beside_is_told(self, alone, name, content, part):
        source = alone(name)
        (source.parent / "config.json").write_text(content)
        assert part in refusal(name, source)

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("enat", {"encoder_depth": 4, "length": 256, "codebook_size": 9, "width": 32}),
            ("autonat", {"depth": 6, "num_classes": 1000, "mlp_ratio": 2.0}),
        ],
    )
    def test_a_config_of_another_model_is_refused_with_every_difference(self, name, other):
        model = dataclasses.replace(CONFIGS[name].model, **other)
        config = dataclasses.replace(CONFIGS[name], model=model)
        message = refusal(name, SOURCES[name], config=config)
        assert message.startswith(f"{SOURCES[name]}: the weights are of another model: ")
        assert message.count("the weights have") == len(other)
        assert all(f"{field} = {value}, the" in message for field, value in other.items()
                   if field != "encoder_depth")  # fmt: skip

    def test_the_other_networks_config_and_weights_are_refused(self):
        message = refusal("enat", SOURCES["enat"], config=CONFIGS["autonat"])
        assert message == "the config's model.name is 'autonat', must be 'enat'"
        assert "these are not ENAT's weights" in refusal("enat", SOURCES["autonat"])
        assert "these are not AutoNAT's weights" in refusal("autonat", SOURCES["enat"])
        assert "these are not a VQGAN's weights" in refusal("vqgan", SOURCES["enat"])

    @pytest.mark.parametrize(
        ("name", "entry"), [("enat", None), ("enat", "ema"), ("autonat", None)]
    )
    def test_a_torch_file_gives_the_same_network(self, tmp_path, name, entry):
        path = save_arrays(tmp_path / "w.pth", recorded(name).weights, entry)
        (tmp_path / "config.json").write_text(json.dumps(BESIDE[name]))
        ours, theirs = read(name, path, key=entry), read(name, SOURCES[name])
        assert ours.metadata == theirs.metadata
        assert same_leaves(nnx.state(ours.model), nnx.state(theirs.model))


def flax_bytes(weights, *path):
    """Arrays by their Flax names as the bytes of MaskGIT's file."""
    tree = {}
    for name, array in weights.items():
        *branches, leaf = [*path, "params", *name.split(".")]
        branch = functools.reduce(lambda branch, step: branch.setdefault(step, {}), branches, tree)
        branch[leaf] = np.ascontiguousarray(array)
    return serialization.to_bytes(tree)


class TestVqgan:
    @pytest.mark.parametrize(
        ("entry", "key"),
        [(None, None), ("state_dict", None), ("ema", "ema"), ("flax", None), ("flax", "m.params")],
    )
    def test_a_file_of_any_layout_gives_the_network(self, vqgan_source, tmp_path, entry, key):
        path = tmp_path / "vqgan.ckpt"
        if entry == "flax":
            path.write_bytes(flax_bytes(recorded("vqgan_flax").weights, *(["m"] if key else [])))
        else:
            beside = {"loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32)}
            save_arrays(path, {**recorded("vqgan").weights, **beside}, entry)
        imported = read_vqgan(path, key=key)
        assert imported.what == str(RECORDED_VQGAN)
        assert same_leaves(nnx.state(imported.model), nnx.state(read_vqgan(vqgan_source).model))

    @pytest.mark.parametrize(
        "name",
        ["vqgan_jax_strongaug.ckpt", "tokenizer_imagenet256_checkpoint"],  # and 512 is as 256
    )
    def test_files_as_large_as_the_published_ones_import(self, tmp_path, name):
        if name.endswith("ckpt"):
            weights = published_vqgan(VQGANConfig(), "torch")
            save_arrays(tmp_path / name, weights, "state_dict", zipfile.ZIP_DEFLATED)
        else:  # half the size of the real one
            weights = published_vqgan(VQGANConfig(), "flax", np.float16)
            (tmp_path / name).write_bytes(flax_bytes(weights))
        imported = read_vqgan(tmp_path / name)
        assert imported.what == str(VQGANConfig())
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(imported.model))) == 54515587

    def test_what_does_not_fit_is_named_with_the_file(self, tmp_path):
        weights = dict(recorded("vqgan").weights)
        del weights["decoder.conv_in.bias"]
        path = save_arrays(tmp_path / "vqgan.ckpt", weights)
        message = refusal("vqgan", path)
        assert message.startswith(f"{path}: the weights do not fit the network: ")
        assert message.endswith("1 missing: decoder.conv_in.bias")


class TestCheckpoint:
    def test_a_network_samples_from_it(self, tmp_path):
        imported = read("autonat", SOURCES["autonat"])
        write_checkpoint(imported, tmp_path / "run")
        model = enat_jax.load(tmp_path / "run", layers="stacked")
        assert dataclasses.asdict(model.config) == imported.metadata["config"]
        assert same_leaves(model.params, nnx.state(imported.model))
        (tokens,) = model.token_batches([3, 7], steps=2)
        assert tokens.shape == (2, 64)

    def test_a_vqgan_is_loaded_from_it_and_nothing_is_written_over(self, vqgan_source, tmp_path):
        imported = read_vqgan(vqgan_source)
        write_checkpoint(imported, tmp_path)
        cfg, loaded = load_vqgan(tmp_path)
        assert cfg == RECORDED_VQGAN
        assert same_leaves(loaded, nnx.state(imported.model))
        metadata = Checkpoints(tmp_path / "checkpoints", read_only=True).metadata()
        assert metadata == {
            "kind": "vqgan",
            "vqgan": {**dataclasses.asdict(cfg), "channel_multipliers": [1, 1, 2, 2, 4]},
            "source": "vqgan.safetensors",
            "source_sha256": hashlib.sha256(vqgan_source.read_bytes()).hexdigest(),
        }
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        with pytest.raises(UserError, match="holds checkpoints already: nothing is written over"):
            write_checkpoint(imported, tmp_path)
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


class Constant(Inception):
    """In place of Inception: the same features whatever the images."""

    def __init__(self, pool):
        self.pool = nnx.Param(jnp.asarray(pool))

    def __call__(self, images):
        return Features(self.pool[...], jnp.zeros((2, 2023)), jnp.zeros((2, 1008)))


class TestCommand:
    @pytest.fixture
    def convert(self, tmp_path, capsys):
        def convert(kind, source, *arguments):
            code = main(["convert", f"--kind={kind}", f"--source={source}", *map(str, arguments)])
            return code, *capsys.readouterr()

        return convert

    @pytest.fixture
    def recording(self, golden, tmp_path):
        recorded = golden("enat/forward.npz")
        names = [n for n in recorded if n == "context" or n.startswith("a/half_masked/")]
        np.savez(tmp_path / "few.npz", **{name: recorded[name] for name in names})
        return tmp_path / "few.npz"

    def test_weights_that_replay_their_recordings_are_written(self, convert, recording, tmp_path):
        out = tmp_path / "run"
        code, text, err = convert("enat", SOURCES["enat"], f"--verify={recording}", f"--out={out}")
        assert (code, err) == (0, "")
        lines = text.splitlines()
        assert lines[0].startswith(f"{SOURCES['enat']} fits: ENATConfig(name='enat', length=64, ")
        assert lines[1].startswith("ok   a/half_masked/logits: largest difference ")
        assert lines[3] == "ok   a/half_masked/masking: 0 of 128 differ"
        assert lines[4] == f"wrote the checkpoint to {out}"
        assert (out / "checkpoints/0").is_dir()

    def test_one_perturbed_weight_exits_with_1_and_writes_nothing(
        self, convert, recording, tmp_path
    ):
        weights = dict(recorded("enat").weights)
        weights["blocks.2.mlp.fc1.bias"] = weights["blocks.2.mlp.fc1.bias"] + 0.01
        save_file(weights, tmp_path / "w.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(BESIDE["enat"]))
        arguments = f"--verify={recording}", f"--out={tmp_path / 'run'}"
        code, text, err = convert("enat", tmp_path / "w.safetensors", *arguments)
        assert code == 1
        assert "FAIL a/half_masked/logits: largest difference " in text
        assert err == "beyond tolerance 5e-05\n"
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("more", "arguments", "code"),
        [(0.0, [], 0), (9e-4, [], 0), (2e-3, [], 1), (2e-3, ["--tolerance=0.01"], 0)],
    )
    def test_inceptions_features_are_replayed(
        self, convert, tmp_path, monkeypatch, more, arguments, code
    ):
        theirs = np.linspace(0, 5, 2 * 2048).reshape(2, 2048).astype(np.float32)
        network = Constant(theirs + np.float32(5 * more))
        monkeypatch.setattr(published, "load_inception", lambda source: network)
        images = np.zeros((2, 3, 64, 48), np.float32)
        np.savez(tmp_path / "r.npz", **{"a/images": images, "a/features": theirs})
        arguments = [f"--verify={tmp_path / 'r.npz'}", *arguments]
        result, text, err = convert("inception", "w.pth", *arguments)
        assert result == code
        assert text.startswith("w.pth fits: FID's Inception; give its path where")
        assert f"{'FAIL' if code else 'ok  '} a/features: largest difference" in text
        assert err == ("beyond tolerance 0.001\n" if code else "")

    @pytest.mark.parametrize(
        ("kind", "flags", "refused"),
        [
            ("vqgan", ["--config=configs/digits.py"], "--config"),
            ("inception", ["--out=a", "--key=a", "--config=b"], "--config, --key, --out"),
        ],
    )
    def test_what_a_kind_does_not_take_is_refused(self, convert, kind, flags, refused):
        _, _, err = convert(kind, SOURCES["enat"], *flags)
        assert err == f"enat convert: --kind={kind} takes no {refused}\n"

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_missing_source_is_refused_in_one_line(self, convert, kind):
        code, _, err = convert(kind, "none.pth")
        assert code == 1
        assert err == "enat convert: none.pth: No such file or directory\n"
