"""MUSE's network, AutoNAT's on captions, against recordings of the original code."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from enat_jax.__main__ import main
from enat_jax.convert.published import KINDS
from enat_jax.convert.verify import recorded_condition, verify
from enat_jax.errors import UserError
from enat_jax.models.autonat import muse_weights
from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.import_table import apply_rules
from enat_jax.models.networks import abstract_params
from tests.support.golden import GOLDEN
from tests.support.replay import verify_generations

SOURCE = GOLDEN / "uvit_text/state_dict.safetensors"
NAMES = {"guidance": "cfg_scale", "mask_len": "n_mask_next"}


@pytest.fixture(scope="module")
def muse():
    return KINDS["muse"].read(SOURCE)


def test_its_sizes_stand_in_weights_and_the_config_beside_them(muse):
    model = muse.metadata["config"]["model"]
    assert (model["condition"], model["num_classes"]) == ("text", 0)
    assert (model["text_length"], model["text_width"], model["text_vocabulary"]) == (77, 20, 0)
    assert muse.metadata["config"]["strategy"]["ranking"] == "logit"


def test_logits_are_the_originals(muse, golden):
    recorded = golden("uvit_text/forward.npz")
    nothing = recorded["empty_context"]
    recorded["unguided/context"] = np.broadcast_to(nothing, recorded["context"].shape)
    compared = verify(muse.model, recorded)
    assert {each.name for each in compared} == {"half_masked/logits", "ragged/logits"}
    assert [each.row(1e-5) for each in compared if each.fails(1e-5)] == []
    recorded = {
        "context": recorded["unguided/context"],
        "empty_context": nothing,
        "ids": recorded["half_masked/ids"],
        "logits": recorded["half_masked/logits_empty_context"],
    }
    assert not any(each.fails(1e-5) for each in verify(muse.model, recorded))


@pytest.mark.parametrize("path", sorted((GOLDEN / "uvit_text").glob("trace_muse_*.npz")))
def test_a_generation_has_the_originals_ids(muse, golden, path):
    recorded = {NAMES.get(name, name): array for name, array in np.load(path).items()}
    recorded["mask_temp"] = recorded["samp_temp"] = recorded["temperature"]
    condition = recorded_condition(golden("uvit_text/forward.npz"))
    compared = verify_generations(muse.model, recorded, condition, ranking="logit")
    assert {"final_ids", "is_mask", "sampled_ids", "confidence"} <= {e.name for e in compared}
    assert [each.row(1e-4) for each in compared if each.fails(1e-4)] == []


def test_the_command_replays_a_recording_and_writes_a_run(tmp_path, capsys):
    forward = GOLDEN / "uvit_text/forward.npz"
    flags = [f"--source={SOURCE}", f"--verify={forward}", f"--out={tmp_path / 'run'}"]
    assert main(["convert", "--kind=muse", *flags]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_weights_of_classes_are_named_as_such():
    with pytest.raises(UserError, match="these are not AutoNAT's weights: no matrix context_embed"):
        KINDS["muse"].read(GOLDEN / "autonat/state_dict.safetensors")


@pytest.mark.slow  # two gigabytes
def test_the_published_file_fits_by_its_names_and_shapes():
    published = json.loads((GOLDEN / "uvit_text/cc3m_285000_shapes.json").read_text())
    shapes = published["shapes"]
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    sizes = muse_weights.sizes_from_weights(weights)
    cfg = dataclasses.replace(
        AutoNATConfig(condition="text", num_classes=0, text_length=77, num_heads=16), **sizes
    )
    state = apply_rules(
        muse_weights.rules(cfg), weights, abstract_params(cfg)[1], unused=muse_weights.never_read
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count == published["n_parameters"]
