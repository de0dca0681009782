"""How a table is applied, and what holds for the table of every network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.errors import UserError
from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.import_table import Rule, apply_rules, below, flatten, transpose, window_first
from enat_jax.tokenizers.vqgan import VQGANConfig
from tests.support import imports


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
ABSTRACT = nnx.state(nnx.eval_shape(Network), nnx.Param)


@pytest.fixture
def weights():
    return {
        "fc.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "fc.bias": np.ones((1, 3, 1), np.float32),
        "blocks.0.w": np.full((1, 4), 5, np.float32),
        "blocks.1.w": np.full((1, 4), 7, np.float32),
    }


def refusal(weights, rules=RULES, **options):
    with pytest.raises(UserError) as caught:
        apply_rules(rules, weights, ABSTRACT, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_tensors_are_transformed_stacked_and_put_in_place_as_float32(weights, dtype):
    state = apply_rules(RULES, {n: x.astype(dtype) for n, x in weights.items()}, ABSTRACT)
    np.testing.assert_array_equal(state["kernel"][...], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(state["bias"][...], [1, 1, 1])
    np.testing.assert_array_equal(state["stack"][...][:, :, 0], [[5] * 4, [7] * 4])
    assert jax.tree.structure(state) == jax.tree.structure(ABSTRACT)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(weights):
    del weights["blocks.1.w"]
    weights["fc.bias"] = np.ones(4, np.float32)
    weights["fc.weight"] = np.ones((2, 3), np.float32)  # of the right size
    weights["head.weight"] = weights["head.bias"] = np.ones(1, np.float32)
    assert refusal(weights) == (
        "the weights do not fit the network: 1 missing: blocks.1.w;"
        " 2 extra: head.bias, head.weight;"
        " 2 misshapen: fc.weight (2, 3) for kernel (2, 3), fc.bias (4,) for bias (3,)"
    )


def test_one_misshapen_block_of_a_stack_is_named_alone(weights):
    weights["blocks.1.w"] = np.ones((1, 5), np.float32)
    message = refusal(weights)
    assert message.endswith("network: 1 misshapen: blocks.1.w (1, 5) for stack (4, 1)")


def test_what_the_network_never_reads_may_be_there_or_not(weights):
    weights["old.bias"] = np.ones(3, np.float32)
    apply_rules(RULES, weights, ABSTRACT, unused=lambda name: name == "old.bias")
    assert "1 extra: old.bias" in refusal(weights)


@pytest.mark.parametrize("rules", [RULES[:2], [*RULES, Rule("x", "missing.kernel")]])
def test_a_table_that_differs_from_the_network_is_refused(weights, rules):
    message = refusal(weights, rules)
    assert "the import table and the network differ in " in message
    assert message.endswith(("stack", "missing.kernel"))


def test_a_modules_rules_are_read_where_it_lies():
    assert below([Rule("w", "kernel", transpose)], "fc", "head") == [
        Rule("fc.w", "head.kernel", transpose)
    ]
    (rule,) = below([Rule("w", "kernel")], ["blocks.0", "blocks.1"], "stack")
    assert rule.names == ("blocks.0.w", "blocks.1.w")
    assert rule.target == "stack.kernel"


def test_a_kernel_gets_its_window_first():
    kernel = window_first(np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7))
    assert kernel.shape == (5, 7, 3, 2)
    assert kernel[4, 6, 2, 1] == 2 * 3 * 5 * 7 - 1
    assert kernel[0, 1, 0, 0] == 1


OTHER_SIZES = {
    "enat published": lambda: imports.token_network(ENATConfig()),
    "enat shallow": lambda: imports.token_network(
        ENATConfig(width=64, encoder_depth=1, decoder_depth=1)
    ),
    "autonat published": lambda: imports.token_network(AutoNATConfig()),
    "autonat shallow": lambda: imports.token_network(AutoNATConfig(width=64, depth=2)),
    **{
        f"{layout} vqgan {number}": lambda cfg=cfg, layout=layout: imports.vqgan(cfg, layout)
        for layout in ("torch", "flax")
        for number, cfg in enumerate((VQGANConfig(), imports.SMALL_VQGAN))
    },
}


@pytest.mark.parametrize("network", OTHER_SIZES)
def test_every_parameter_is_set_once_at_any_size(network):
    case = OTHER_SIZES[network]()
    abstract = nnx.state(nnx.eval_shape(lambda: case.make(rngs=nnx.Rngs(0))))
    paths = sorted(".".join(map(str, path)) for path, _ in nnx.to_flat_state(abstract))
    assert sorted(rule.target for rule in case.rules) == paths


@pytest.mark.parametrize("name", imports.NAMES)
class TestPublishedLayouts:
    def test_every_tensor_is_read_by_one_rule_or_never(self, name):
        case = imports.recorded(name)
        read = [source for rule in case.rules for source in rule.names]
        unread = [source for source in case.weights if case.never_read(source)]
        assert sorted([*read, *unread]) == sorted(case.weights)
        assert len(unread) == {"enat": 4, "inception": 95, "lpips": 1}.get(name, 0)

    def test_they_fill_the_network_with_or_without_what_it_never_reads(self, name):
        case = imports.recorded(name)
        state = nnx.state(case.model())
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}
        case.model(**{source: None for source in case.weights if case.never_read(source)})

    def test_what_is_no_float_or_not_finite_is_named(self, name):
        case = imports.recorded(name)
        names = [source for rule in case.rules for source in rule.names][:3]
        nan, whole, yes = (case.weights[source].copy() for source in names)
        nan.reshape(-1)[0] = np.nan
        with pytest.raises(UserError) as caught:
            case.model(**dict(zip(names, (nan, whole.astype(np.int32), yes > 0), strict=True)))
        message = "network: {} not finite or no floats: {}, {} of int32, {} of bool"
        assert message.format(3, *names) in str(caught.value)

    def test_what_is_missing_extra_or_misshapen_is_named_at_once(self, name):
        case = imports.recorded(name)
        read = [source for rule in case.rules for source in rule.names]
        changes = {read[5]: None, read[-1]: np.zeros((2, 3, 4)), "extra": np.zeros(3)}
        with pytest.raises(UserError) as caught:
            case.model(**changes)
        message = str(caught.value)
        assert f"network: 1 missing: {read[5]}; 1 extra: extra;" in message
        assert f"; 1 misshapen: {read[-1]} (2, 3, 4) for {case.rules[-1].target} (" in message
