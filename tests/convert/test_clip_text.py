"""From CLIP's published text weights to a checkpoint that holds tower and tokenizer."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from enat_jax.__main__ import main
from enat_jax.checkpoints.text_encoder import load_text_encoder
from enat_jax.convert.published import read_clip_text
from tests.support.clip import clip_source
from tests.support.golden import GOLDEN
from tests.support.imports import clip_text

RECORDED = {tower: GOLDEN / f"clip_text/{tower}/state_dict.safetensors"
            for tower in ("clip_l", "bigg")}  # fmt: skip


@pytest.fixture
def convert(capsys):
    def convert(source, *arguments):
        code = main(["convert", "--kind=clip_text", f"--source={source}", *map(str, arguments)])
        return code, *capsys.readouterr()

    return convert


def refused(convert, source, *arguments):
    code, _, err = convert(source, *arguments)
    assert code == 1
    assert err.count("\n") == 1
    return err.removeprefix("enat convert: ").removesuffix("\n")


@pytest.mark.parametrize("tower", RECORDED)
def test_recorded_towers_replay_their_recordings(convert, tower):
    arrays = GOLDEN / f"clip_text/{tower}/io.npz"
    code, text, err = convert(RECORDED[tower], f"--verify={arrays}")
    assert (code, err) == (0, "")
    assert text.startswith(f"{RECORDED[tower]} fits: CLIPTextConfig(vocabulary=101, length=77, ")
    recorded = {key for key in np.load(arrays) if "eps" not in key and "ids/" not in key}
    kinds = ("hidden_states", "last_hidden_state", "penultimate_final_ln", "text_embeds")
    replayed = {key for key in recorded if key.endswith(kinds) and key.count("/") == 1}
    assert {line.split(":")[0] for line in text.splitlines()[1:]} == {f"ok   {k}" for k in replayed}
    assert ("pad_eos/text_embeds" in replayed) == (tower == "bigg")


@pytest.mark.parametrize(
    ("tower", "tensor", "part"),
    [
        ("clip_l", "text_model.encoder.layers.2.self_attn.k_proj.weight", "last_hidden_state"),
        ("clip_l", "text_model.final_layer_norm.bias", "penultimate_final_ln"),
        ("bigg", "text_projection.weight", "text_embeds"),
    ],
)
def test_one_changed_weight_exits_with_1_and_writes_nothing(convert, tmp_path, tower, tensor, part):
    weights = dict(clip_text(f"{tower}/state_dict.safetensors").weights)
    weights[tensor] = weights[tensor].copy()
    weights[tensor][..., 3] += 0.01
    save_file(weights, tmp_path / "w.safetensors")
    shutil.copy(RECORDED[tower].with_name("config.json"), tmp_path)
    arrays = GOLDEN / f"clip_text/{tower}/io.npz"
    out = tmp_path / "run"
    code, text, err = convert(tmp_path / "w.safetensors", f"--verify={arrays}", f"--out={out}")
    assert (code, err) == (1, "beyond tolerance 1e-05\n")
    assert f"FAIL pad_zero/{part}: largest difference " in text
    assert not out.exists()


def test_a_run_is_whole_without_its_source(convert, tmp_path):
    source = clip_source(tmp_path / "source", output="penultimate")
    arrays = GOLDEN / "clip_text/clip_l/io.npz"
    out = tmp_path / "run"
    code, text, err = convert(source, f"--verify={arrays}", f"--out={out}")
    assert (code, err) == (0, "")
    assert text.splitlines()[0].endswith(
        "CLIPTokenizerConfig(rule='hugging_face', padding=-1, length=77)"
    )
    imported = read_clip_text(source)
    shutil.rmtree(tmp_path / "source")
    tokenizer, encoder = load_text_encoder(out)
    assert encoder.cfg == imported.model.cfg
    assert encoder.cfg.output == "penultimate"
    jax.tree.map(
        np.testing.assert_array_equal, encoder.params, nnx.state(imported.model, nnx.Param)
    )
    assert tokenizer(["a cat"])[0, :5].tolist() == [49406, 320, 2368, 49407, 49407]


@pytest.mark.parametrize(
    ("beside", "config"),
    [
        ({}, ("open_clip", 0)),
        ({"tokenizer": {"padding": -1}}, ("open_clip", -1)),
        ({"tokenizer": {"rule": "hugging_face"}}, ("hugging_face", 0)),
    ],
)
def test_rule_and_padding_are_those_of_the_names_or_as_is_said(
    tmp_path, monkeypatch, beside, config
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # whether ftfy is there
    metadata = read_clip_text(clip_source(tmp_path, file="open_clip_text", **beside)).metadata
    assert (metadata["tokenizer"]["rule"], metadata["tokenizer"]["padding"]) == config
    assert metadata["source"] == "open_clip_text.safetensors"


def test_a_config_that_is_wrong_or_of_another_tower_is_told(convert, tmp_path):
    source = clip_source(tmp_path)
    beside = source.with_name("config.json")
    told = beside.read_text()
    for content, part in {
        "{": "config.json: corrupt, or no config of CLIP (JSONDecodeError",
        "3": "config.json: corrupt, or no config of CLIP (TypeError",
        "{}": "state_dict.safetensors: neither weights nor config.json tell num_attention_heads",
        told.replace("hidden_size\": 32", "hidden_size\": 9"):
            "state_dict.safetensors: the weights are of another tower: hidden_size = 9, the",
        told.replace("quick_gelu", "relu"): "config: activation = 'relu' must be one of",
        told[:-1] + ', "tokenizer": {"rule": "t5"}}': "config: rule = 't5' must be one of",
        told[:-1] + ', "tokenizer": 5}': "corrupt, or no tokenizer of CLIP (TypeError",
    }.items():  # fmt: skip
        beside.write_text(content)
        assert part in refused(convert, source)
    beside.unlink()
    assert refused(convert, source) == f"{beside}: No such file or directory"


def test_a_tokenizer_that_is_damaged_missing_or_another_towers_is_told(convert, tmp_path):
    source, out = clip_source(tmp_path), tmp_path / "run"
    vocab, merges = (source.with_name(name) for name in ("vocab.json", "merges.txt"))
    content = vocab.read_text()
    for text, part in {
        content.replace("49407", "50000"): "vocab.json has 50001 ids, the tower 49408",
        content[:-9]: "vocab.json is no JSON",
    }.items():
        vocab.write_text(text)
        assert part in refused(convert, source, f"--out={out}")
    merges.unlink()
    lacking = ": a checkpoint is to hold the tokenizer, too"
    assert refused(convert, source, f"--out={out}") == f"no {merges}{lacking}"
    vocab.unlink()
    assert refused(convert, source, f"--out={out}") == f"no {vocab} and no {merges}{lacking}"
    assert not out.exists()


def test_weights_that_are_damaged_or_others_are_told(convert, tmp_path):
    source = shutil.copy(RECORDED["clip_l"], tmp_path / "w.safetensors")
    shutil.copy(RECORDED["clip_l"].with_name("config.json"), tmp_path)
    weights = dict(clip_text("clip_l/state_dict.safetensors").weights)
    del weights["text_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(weights, source)
    assert "1 missing: text_model.encoder.layers.1.mlp.fc2.bias" in refused(convert, source)
    source.write_bytes(source.read_bytes()[:5000])
    assert "w.safetensors: corrupt, or no weight file" in refused(convert, source)
    shutil.copy(GOLDEN / "enat/state_dict.safetensors", source)
    assert "these are not CLIP's text weights" in refused(convert, source)
