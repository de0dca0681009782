"""From published VQGAN and Inception weights to a checkpoint, and the command that does it."""

import dataclasses
import functools
import hashlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from safetensors.numpy import save_file

from enat_jax.__main__ import main
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import load_vqgan
from enat_jax.convert.published import convert_vqgan, write_vqgan
from enat_jax.convert.torch_pickle import WeightFileError
from enat_jax.evaluation import inception_weights as inception
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.models.import_table import ConvertError
from enat_jax.tokenizers.vqgan import VQGANConfig
from enat_jax.tokenizers.vqgan_weights import rules
from tests.convert.test_published import SOURCE, same_leaves, write_torch
from tests.golden.vqgan.load_state import load_state
from tests.support.golden import GOLDEN
from tests.tokenizers.test_vqgan_weights import made

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def vqgan_weights():
    """The recorded VQGAN's PyTorch weights by name."""
    return load_state(GOLDEN / "vqgan")


@pytest.fixture(scope="module")
def vqgan_source(vqgan_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("vqgan") / "vqgan.safetensors"
    save_file(vqgan_weights, path)
    return path


@pytest.fixture(scope="module")
def converted(vqgan_source):
    return convert_vqgan(vqgan_source)


RECORDED_VQGAN = VQGANConfig(channels=32, latent_channels=32, codebook_size=64)


def tree_of(arrays):
    """Arrays by their Flax names as the tree of MaskGIT's file."""
    tree = {}
    for name, array in arrays.items():
        *branches, leaf = ["params", *name.split(".")]
        branch = functools.reduce(lambda branch, step: branch.setdefault(step, {}), branches, tree)
        branch[leaf] = np.ascontiguousarray(array)
    return tree


def flax_tree(weights):
    """PyTorch weights as the tree of MaskGIT's file."""
    torch = {rule.target: rule for rule in rules(RECORDED_VQGAN, "torch")}
    pairs = [(rule, torch[rule.target]) for rule in rules(RECORDED_VQGAN, "flax")]
    return tree_of({ours.source: how.transform(weights[how.source]) for ours, how in pairs})


class TestPublishedSizes:
    """Files as large as the published ones, but of zeros; one VQGAN serves 256 and 512 pixels."""

    def check(self, path):
        cfg, params = convert_vqgan(path)
        assert cfg == VQGANConfig()
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 54515587

    def test_mages_file_imports(self, tmp_path):
        path = tmp_path / "vqgan_jax_strongaug.ckpt"
        weights = made(VQGANConfig(), "torch")
        self.check(write_torch(path, weights, "state_dict", zipfile.ZIP_DEFLATED))

    @pytest.mark.parametrize("pixels", [256, 512])
    def test_maskgits_files_import(self, tmp_path, pixels):
        path = tmp_path / f"tokenizer_imagenet{pixels}_checkpoint"
        weights = made(VQGANConfig(), "flax", np.float16)  # half the size of the real ones
        path.write_bytes(serialization.to_bytes(tree_of(weights)))
        self.check(path)


class TestVqganSource:
    @pytest.mark.parametrize(("entry", "key"), [(None, None), ("state_dict", None), ("ema", "ema")])
    def test_a_torch_file_gives_the_network(self, vqgan_weights, converted, tmp_path, entry, key):
        beside = {"loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32)}
        path = write_torch(tmp_path / "vqgan.ckpt", {**vqgan_weights, **beside}, entry)
        cfg, params = convert_vqgan(path, key=key)
        assert cfg == converted[0] == RECORDED_VQGAN
        assert same_leaves(params, converted[1])

    @pytest.mark.parametrize(("entry", "key"), [(None, None), ("model", "model.params")])
    def test_a_flax_file_gives_the_network(self, vqgan_weights, converted, tmp_path, entry, key):
        tree = flax_tree(vqgan_weights)
        path = tmp_path / "tokenizer_imagenet512_checkpoint"
        path.write_bytes(serialization.to_bytes(tree if entry is None else {entry: tree}))
        cfg, params = convert_vqgan(path, key=key)
        assert cfg == RECORDED_VQGAN
        assert same_leaves(params, converted[1])

    def test_a_file_of_another_network_is_refused_by_its_path(self, tmp_path):
        with pytest.raises(ConvertError, match="these are not a VQGAN's weights") as caught:
            convert_vqgan(SOURCE)
        assert str(caught.value).startswith(f"{SOURCE}: ")
        path = tmp_path / "maskgit_imagenet256_checkpoint"
        path.write_bytes(serialization.to_bytes({"params": {"Embed_0": {"scale": np.ones(3)}}}))
        with pytest.raises(ConvertError, match="these are not a VQGAN's weights"):
            convert_vqgan(path)

    def test_a_tensor_that_does_not_fit_is_named_with_the_file(self, vqgan_weights, tmp_path):
        less = {name: x for name, x in vqgan_weights.items() if name != "decoder.conv_in.bias"}
        path = write_torch(tmp_path / "vqgan.ckpt", less)
        with pytest.raises(ConvertError, match=r"1 missing: decoder.conv_in.bias$") as caught:
            convert_vqgan(path)
        assert str(caught.value).startswith(f"{path}: ")

    def test_an_entry_that_is_not_there_is_told(self, vqgan_source, vqgan_weights, tmp_path):
        path = write_torch(tmp_path / "vqgan.ckpt", vqgan_weights, "model")
        with pytest.raises(WeightFileError, match=r"choose a dict inside with key=: 'model'"):
            convert_vqgan(path)
        with pytest.raises(WeightFileError, match="no entry 'ema'; entries: 'model', 'step'"):
            convert_vqgan(path, key="ema")
        with pytest.raises(WeightFileError, match="No such file"):
            convert_vqgan(tmp_path / "none.ckpt")


class TestVqganCheckpoint:
    def test_it_loads_as_a_tokenizer_with_these_weights(self, converted, vqgan_source, tmp_path):
        cfg, params = converted
        write_vqgan(cfg, params, tmp_path / "run", vqgan_source)
        found, loaded = load_vqgan(tmp_path / "run")
        assert found == cfg
        assert same_leaves(loaded, params)
        metadata = Checkpoints(tmp_path / "run/checkpoints", read_only=True).metadata()
        assert metadata == {
            "kind": "vqgan",
            "vqgan": {**dataclasses.asdict(cfg), "channel_multipliers": [1, 1, 2, 2, 4]},
            "source": "vqgan.safetensors",
            "source_sha256": hashlib.sha256(vqgan_source.read_bytes()).hexdigest(),
        }
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        with pytest.raises(ConvertError, match="holds checkpoints already: nothing is written"):
            write_vqgan(cfg, params, tmp_path / "run", vqgan_source)
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


class TestVqganCommand:
    def convert(self, source, *arguments):
        return main(["convert", "--kind=vqgan", f"--source={source}", *map(str, arguments)])

    def test_weights_that_replay_their_recording_are_written(self, vqgan_source, tmp_path, capsys):
        recording = GOLDEN / "vqgan/io.npz"
        code = self.convert(vqgan_source, f"--verify={recording}", f"--out={tmp_path / 'run'}")
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == f"{vqgan_source} fits: {RECORDED_VQGAN}"
        assert sorted(lines[1:3])[1] == "ok   vqgan ids: 0 of 32 differ"
        assert sorted(lines[1:3])[0].startswith("ok   vqgan floats: largest difference ")
        assert lines[3] == f"wrote the checkpoint to {tmp_path / 'run'}"
        assert (tmp_path / "run/checkpoints/0").is_dir()

    def test_one_perturbed_weight_exits_with_1_and_writes_nothing(
        self, vqgan_weights, tmp_path, capsys
    ):
        bias = vqgan_weights["decoder.conv_out.bias"] + np.float32([0, 0, 2e-4])
        save_file({**vqgan_weights, "decoder.conv_out.bias": bias}, tmp_path / "w.safetensors")
        code = self.convert(
            tmp_path / "w.safetensors",
            f"--verify={GOLDEN / 'vqgan/io.npz'}", f"--out={tmp_path / 'run'}",
        )  # fmt: skip
        out, err = capsys.readouterr()
        assert code == 1
        assert "FAIL vqgan floats: largest difference " in out
        assert "ok   vqgan ids" in out
        assert err == "beyond tolerance 0.0001\n"
        assert not (tmp_path / "run").exists()

    def test_what_only_enat_takes_is_refused(self, vqgan_source, capsys):
        assert self.convert(vqgan_source, "--config=configs/digits.py") == 1
        assert capsys.readouterr().err == "enat convert: --kind=vqgan takes no --config\n"


class Constant(Inception):
    """In place of Inception: the same features whatever the images."""

    def __init__(self, pool):
        self.pool = nnx.Param(jnp.asarray(pool))

    def __call__(self, images):
        assert images.shape == (2, 64, 48, 3)
        return Features(self.pool[...], jnp.zeros((2, 2023)), jnp.zeros((2, 1008)))


class TestInceptionCommand:
    def convert(self, *arguments):
        return main(["convert", "--kind=inception", *map(str, arguments)])

    def test_another_file_is_refused(self, capsys):
        assert self.convert(f"--source={SOURCE}") == 1
        err = capsys.readouterr().err
        assert "not FID's published Inception weights" in err
        assert err.count("\n") == 1

    def test_it_is_only_checked(self, tmp_path, capsys):
        options = [f"--out={tmp_path}", "--key=a", "--config=b"]
        assert self.convert(f"--source={SOURCE}", *options) == 1
        message = "enat convert: --kind=inception takes no --config, --key, --out\n"
        assert capsys.readouterr().err == message

    @pytest.mark.parametrize(("more", "code"), [(0.0, 0), (9e-4, 0), (2e-3, 1)])
    def test_features_are_replayed(self, tmp_path, monkeypatch, capsys, more, code):
        theirs = np.linspace(0, 5, 2 * 2048).reshape(2, 2048).astype(np.float32)
        network = Constant(theirs + np.float32(5 * more))
        monkeypatch.setattr(inception, "load_inception", lambda path: network)
        images = np.zeros((2, 3, 64, 48), np.float32)
        np.savez(tmp_path / "r.npz", **{"a/images": images, "a/features": theirs})
        assert self.convert("--source=w.pth", f"--verify={tmp_path / 'r.npz'}") == code
        out, err = capsys.readouterr()
        assert f"{'FAIL' if code else 'ok  '} a, of the largest floats: largest difference" in out
        assert err == ("beyond tolerance 0.001\n" if code else "")
