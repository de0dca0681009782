"""A converted text encoder is loaded with its tokenizer, and nothing else is taken for one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.checkpoints.store import CheckpointError
from enat_jax.checkpoints.text_encoder import load_text_encoder
from enat_jax.convert.published import read_clip_text, write_checkpoint
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.text.protocol import TextEncoder, TextTokenizer
from tests.support.clip import clip_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_clip_text(clip_source(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_checkpoint(source, folder)
    return folder


def test_captions_become_the_towers_features(workdir, source, golden):
    warnings = []
    tokenizer, encoder = load_text_encoder(workdir, warn=warnings.append)
    assert isinstance(tokenizer, TextTokenizer)
    assert isinstance(encoder, TextEncoder)
    ids = tokenizer(["a photo of a cat", "", "a " * 80])
    assert warnings == ["captions of more than 77 ids are cut: 1 of 3"]
    features = jax.jit(encoder.encode)(encoder.params, jnp.asarray(ids))
    assert features.shape == (3, 77, encoder.width)
    np.testing.assert_array_equal(features, jax.jit(lambda m, ids: m(ids))(source.model, ids))


def test_weights_are_replicated_and_of_the_type_asked_for(workdir):
    placement = Placement.of(MeshConfig())
    _, encoder = load_text_encoder(workdir, placement, dtype="bfloat16")
    assert {leaf.sharding for leaf in jax.tree.leaves(encoder.params)} == {placement.replicated}
    assert encoder.cfg.dtype == "bfloat16"


def test_the_digest_tells_weights_and_what_is_read_of_them_apart(workdir, source, tmp_path):
    digest = load_text_encoder(workdir)[1].digest
    assert len(digest) == 64
    assert load_text_encoder(workdir, dtype="bfloat16")[1].digest == digest
    told = {**source.metadata["clip_text"], "output": "penultimate"}
    write_checkpoint(source._replace(metadata={**source.metadata, "clip_text": told}), tmp_path)
    assert load_text_encoder(tmp_path)[1].digest != digest


def test_what_is_no_text_encoder_is_refused(tmp_path, source):
    with pytest.raises(CheckpointError, match=r"^text\.weights = .* is no workdir of a text enc"):
        load_text_encoder(tmp_path)
    write_checkpoint(source._replace(metadata={"config": {}}), tmp_path)
    with pytest.raises(CheckpointError, match="holds another model than a text encoder"):
        load_text_encoder(tmp_path)
