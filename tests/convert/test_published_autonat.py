import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import enat_jax
from enat_jax.__main__ import main
from enat_jax.config import Config, TokenizerConfig
from enat_jax.convert.published import convert_network
from enat_jax.convert.verify_autonat import verify_autonat
from enat_jax.models.import_table import ConvertError
from tests.convert.test_published import same_leaves, write_torch
from tests.support.golden import GOLDEN
from tests.support.recorded_autonat import autonat_from, recorded_config, recorded_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOURCE = GOLDEN / "autonat/state_dict.safetensors"


@pytest.fixture
def config():
    return Config(model=recorded_config(), tokenizer=TokenizerConfig(grid=(8, 8)))


@pytest.fixture
def source(tmp_path):
    """The recorded weights in a folder of their own, where nothing lies beside them."""
    return Path(shutil.copy(SOURCE, tmp_path / "weights.safetensors"))


@pytest.fixture
def recording(golden, tmp_path):
    recorded = golden("autonat/forward.npz")
    names = [n for n in recorded if n == "context" or n.startswith("ragged/")]
    np.savez(tmp_path / "few.npz", **{name: recorded[name] for name in names})
    return tmp_path / "few.npz"


def refusal(*arguments, name="autonat", **options):
    with pytest.raises(ConvertError) as caught:
        convert_network(*arguments, name=name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestSizes:
    def test_heads_come_from_the_config_beside_the_weights(self):
        config, _ = convert_network(SOURCE, name="autonat")
        assert config.model == recorded_config()
        assert config.tokenizer == TokenizerConfig(name="none", grid=(8, 8))
        assert config.train.mean_over == "tokens"
        assert config.strategy.masking == "autonat"

    def test_or_from_the_config_given(self, source, config):
        found, params = convert_network(source, name="autonat", config=config)
        assert found == config
        assert same_leaves(params, convert_network(SOURCE, name="autonat")[1])

    def test_without_either_it_is_said_what_is_missing(self, source):
        message = refusal(source)
        assert "weights do not tell num_heads: give --config, or put num_heads into" in message
        assert str(source.parent / "config.json") in message

    @pytest.mark.parametrize(
        ("content", "part"),
        [("{}", "KeyError: 'num_heads'"), ('{"num_heads": "4"}', "must be a whole number"),
         ("[]", "TypeError")],
    )  # fmt: skip
    def test_a_wrong_config_beside_is_named(self, source, content, part):
        (source.parent / "config.json").write_text(content)
        message = refusal(source)
        assert str(source.parent / "config.json") in message
        assert part in message

    def test_a_config_of_another_model_is_refused_with_every_difference(self, source, config):
        other = dataclasses.replace(config.model, width=32, depth=6)
        message = refusal(source, config=dataclasses.replace(config, model=other))
        assert "model.width = 32, the weights have 64" in message
        assert "model.depth = 6, the weights have 4" in message

    def test_the_other_networks_config_and_weights_are_refused(self, source, config):
        message = refusal(source, config=config, name="enat")
        assert message == "the config's model.name is 'autonat', must be 'enat'"
        assert "these are not ENAT's weights" in refusal(source, name="enat")
        assert "not AutoNAT's weights" in refusal(GOLDEN / "enat/state_dict.safetensors")


def test_a_torch_file_gives_the_same_network(tmp_path):
    path = write_torch(tmp_path / "nnet_ema.pth", recorded_weights())
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4}))
    config, params = convert_network(path, name="autonat")
    expected_config, expected = convert_network(SOURCE, name="autonat")
    assert config == expected_config
    assert same_leaves(params, expected)


class TestRecordings:
    def test_one_perturbed_weight_fails(self, golden):
        weights = dict(recorded_weights())
        name = "in_blocks.0.attn.proj.bias"
        weights[name] = weights[name] + 0.01
        found = verify_autonat(autonat_from(weights), golden("autonat/forward.npz"))
        assert len(found) == 4
        assert all(each.fails(1e-4) for each in found)

    def test_a_wrong_number_of_heads_fails(self, golden):
        model = autonat_from(
            recorded_weights(), dataclasses.replace(recorded_config(), num_heads=8)
        )
        assert any(
            each.fails(1e-4) for each in verify_autonat(model, golden("autonat/forward.npz"))
        )

    def test_nothing_to_replay_is_an_error(self):
        with pytest.raises(ConvertError, match=r"nothing to verify among the keys \['pictures'"):
            verify_autonat(autonat_from(recorded_weights()), {"pictures": np.zeros(3)})


class TestCommand:
    def convert(self, *arguments, source=SOURCE):
        return main(["convert", "--kind=autonat", f"--source={source}", *map(str, arguments)])

    def test_weights_that_replay_their_recordings_are_written_and_sampled_from(
        self, recording, tmp_path, capsys
    ):
        code = self.convert(f"--verify={recording}", f"--out={tmp_path / 'run'}")
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].startswith(f"{SOURCE} fits: AutoNATConfig(name='autonat', length=64, ")
        assert lines[1].startswith("ok   ragged floats: largest difference ")
        assert lines[2] == f"wrote the checkpoint to {tmp_path / 'run'}"
        model = enat_jax.load(tmp_path / "run")
        assert model.config.model == recorded_config()
        (tokens,) = model.token_batches([3, 7], steps=2)
        assert tokens.shape == (2, 64)

    def test_one_perturbed_weight_exits_with_1_and_writes_nothing(
        self, recording, tmp_path, capsys
    ):
        weights = dict(recorded_weights())
        weights["mid_block.mlp.fc1.bias"] = weights["mid_block.mlp.fc1.bias"] + 0.01
        (tmp_path / "bad").mkdir()
        save_file(weights, tmp_path / "bad/weights.safetensors")
        shutil.copy(GOLDEN / "autonat/config.json", tmp_path / "bad")
        code = self.convert(
            f"--verify={recording}", f"--out={tmp_path / 'run'}",
            source=tmp_path / "bad/weights.safetensors",
        )  # fmt: skip
        out, err = capsys.readouterr()
        assert code == 1
        assert "FAIL ragged floats: largest difference " in out
        assert err == "beyond tolerance 0.0001\n"
        assert not (tmp_path / "run").exists()
