import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.models.import_table import ConvertError, Rule, apply_rules, flatten, transpose


class Network(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((2, 3)))
        self.bias = nnx.Param(jnp.zeros(3))
        self.stack = nnx.Param(jnp.zeros((2, 4, 1)))


RULES = [
    Rule("fc.weight", "kernel", transpose),
    Rule("fc.bias", "bias", flatten),
    Rule(("blocks.0.w", "blocks.1.w"), "stack", transpose),
]


@pytest.fixture
def abstract():
    return nnx.state(nnx.eval_shape(Network), nnx.Param)


@pytest.fixture
def weights():
    return {
        "fc.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "fc.bias": np.ones((1, 3, 1), np.float32),
        "blocks.0.w": np.full((1, 4), 5, np.float32),
        "blocks.1.w": np.full((1, 4), 7, np.float32),
    }


def refusal(weights, abstract, rules=RULES, **options):
    with pytest.raises(ConvertError) as caught:
        apply_rules(rules, weights, abstract, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_are_transformed_stacked_and_put_in_place(weights, abstract):
    state = apply_rules(RULES, weights, abstract)
    np.testing.assert_array_equal(state["kernel"][...], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(state["bias"][...], [1, 1, 1])
    np.testing.assert_array_equal(state["stack"][...][:, :, 0], [[5] * 4, [7] * 4])
    assert jax.tree.structure(state) == jax.tree.structure(abstract)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_values_take_the_parameters_type(weights, abstract, dtype):
    half = {name: array.astype(dtype) for name, array in weights.items()}
    state = apply_rules(RULES, half, abstract)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(state["kernel"][...], [[0, 2, 4], [1, 3, 5]])


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(weights, abstract):
    del weights["blocks.1.w"]
    weights["fc.bias"] = np.ones(4, np.float32)
    weights["fc.weight"] = np.ones((2, 3), np.float32)
    weights["head.weight"] = weights["head.bias"] = np.ones(1, np.float32)
    assert refusal(weights, abstract) == (
        "the weights do not fit the network: 1 missing: blocks.1.w;"
        " 2 extra: head.bias, head.weight;"
        " 2 misshapen: fc.weight (2, 3) for kernel (2, 3), fc.bias (4,) for bias (3,)"
    )


def test_one_misshapen_block_of_a_stack_is_named_alone(weights, abstract):
    weights["blocks.1.w"] = np.ones((1, 5), np.float32)
    message = refusal(weights, abstract)
    assert "1 misshapen: blocks.1.w (1, 5) for stack (4, 1)" in message
    assert "blocks.0.w" not in message


def test_a_tensor_of_the_right_size_but_another_shape_is_refused(weights, abstract):
    weights["fc.weight"] = weights["fc.weight"].reshape(2, 3)
    assert "fc.weight (2, 3) for kernel (2, 3)" in refusal(weights, abstract)


def test_what_the_network_never_reads_may_be_there_or_not(weights, abstract):
    weights["old.bias"] = np.ones(3, np.float32)
    state = apply_rules(RULES, weights, abstract, unused=lambda name: name == "old.bias")
    assert set(state) == {"kernel", "bias", "stack"}
    assert "1 extra: old.bias" in refusal(weights, abstract)


@pytest.mark.parametrize("rules", [RULES[:2], [*RULES, Rule("x", "missing.kernel")]])
def test_a_table_that_differs_from_the_network_is_refused(weights, abstract, rules):
    message = refusal(weights, abstract, rules)
    assert "the rule table and the network differ in " in message
    assert message.endswith(("stack", "missing.kernel"))
