import dataclasses

import numpy as np
import pytest

from enat_jax.convert.verify import Comparison, verify
from enat_jax.models.import_table import ConvertError
from tests.support.golden import enat_from, golden_enat_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 5e-5


def under(recorded, *prefixes):
    return {name: value for name, value in recorded.items() if name.startswith(prefixes)}


@pytest.fixture
def forward(golden):
    """A pass with half of the tokens masked, and a chain of two."""
    recorded = golden("enat/forward.npz")
    return under(recorded, "context", "a/half_masked/", "b/chain2/")


@pytest.fixture
def trace(golden):
    return under(golden("enat/traces.npz"), "T4/labels", "T4/gumbel", "T4/cfg/")


def failed(comparisons):
    return [each.name for each in comparisons if each.fails(TOLERANCE)]


class TestForwardPasses:
    def test_the_recorded_network_passes(self, enat, forward):
        found = verify(enat, forward)
        assert failed(found) == []
        assert sorted(each.name for each in found) == sorted(
            f"{group}/{name}"
            for group in ("a/half_masked", "b/chain2/0", "b/chain2/1")
            for name in ("logits", "feat", "masking")
        )
        assert {each.name for each in found if each.exact} == {
            "a/half_masked/masking", "b/chain2/0/masking", "b/chain2/1/masking",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "groups"),
        [
            ("blocks.0.attn.proj.bias", {"a/half_masked", "b/chain2/0", "b/chain2/1"}),
            ("prev_proj.mlp.fc2.bias", {"b/chain2/1"}),  # only what reuses features reads it
        ],
    )
    def test_one_perturbed_weight_fails(self, enat_weights, forward, name, groups):
        changed = enat_weights[name].copy()
        changed[3] += 0.01
        found = verify(enat_from({**enat_weights, name: changed}), forward)
        assert {each.rpartition("/")[0] for each in failed(found)} == groups

    def test_a_wrong_number_of_heads_fails(self, enat_weights, forward):
        cfg = dataclasses.replace(golden_enat_config(), num_heads=8)
        assert failed(verify(enat_from(enat_weights, cfg), forward))

    def test_a_recording_with_a_nan_fails(self, enat, forward):
        forward["a/half_masked/logits"][0, 0, 0] = np.nan
        assert failed(verify(enat, forward)) == ["a/half_masked/logits"]

    def test_a_chain_that_lacks_a_link_is_refused(self, enat, forward):
        with pytest.raises(ConvertError, match="b/chain2/1 continues a chain"):
            verify(enat, under(forward, "context", "b/chain2/1/"))

    def test_images_with_different_counts_are_refused(self, enat, forward):
        ids = forward["a/half_masked/ids"]
        ids[0, ids[0] == 64] = 3
        with pytest.raises(ConvertError, match="different counts of tokens"):
            verify(enat, under(forward, "context", "a/"))

    def test_a_recording_of_another_shape_is_refused(self, enat, forward):
        forward["a/half_masked/feat"] = forward["a/half_masked/feat"][..., :32]
        with pytest.raises(ConvertError, match=r"a/half_masked/feat: recorded \(2, 64, 32\)"):
            verify(enat, under(forward, "context", "a/"))


class TestGenerations:
    def test_the_recorded_network_passes(self, enat, trace):
        found = {each.name.rpartition("/")[2]: each for each in verify(enat, trace)}
        assert failed(found.values()) == []
        given = {"cfg_scale", "samp_temp", "mask_temp", "n_mask_next", "sel_steps",
                 "samp_margin", "conf_margin"}  # fmt: skip
        recorded = {name.removeprefix("T4/cfg/") for name in under(trace, "T4/cfg/")}
        assert set(found) == recorded - given
        assert {"final_ids", "sampled_ids", "new_mask", "confidence"} <= set(found)
        assert found["final_ids"].exact
        assert found["final_ids"].size == 2 * 64

    def test_one_wrong_token_fails(self, enat, trace):
        trace["T4/cfg/final_ids"][1, 17] += 1
        found = [each for each in verify(enat, trace) if each.fails(TOLERANCE)]
        assert found == [Comparison("T4/cfg/final_ids", 1.0, True, 128)]


def test_nothing_to_replay_is_an_error(enat):
    with pytest.raises(ConvertError, match=r"nothing to verify among the keys \['pictures'"):
        verify(enat, {"pictures": np.zeros(3)})


@pytest.mark.parametrize(
    ("difference", "exact", "fails"),
    [(0.0, True, False), (1.0, True, True), (4e-5, False, False), (6e-5, False, True),
     (np.nan, False, True), (np.inf, False, True)],
)  # fmt: skip
def test_integers_must_be_equal_and_floats_within_tolerance(difference, exact, fails):
    assert Comparison("x", difference, exact, 1).fails(TOLERANCE) == fails
