"""What is read from the text of compiled programs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from enat_jax.parallel.placement import Placement
from enat_jax.tools.hlo import count_program, group_size


def counts_of(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return count_program(jax.jit(function).lower(*shapes).compile().as_text())


def test_a_product_is_two_flops_per_multiply_add():
    assert counts_of(lambda a, b: a @ b, (32, 48), (48, 64)).flops == 2 * 32 * 48 * 64
    batched = counts_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 32, 48), (5, 48, 64))
    assert batched.flops == 5 * 2 * 32 * 48 * 64


def test_a_loops_body_counts_as_often_as_it_turns():
    def scan(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    def nested(x, w):
        return jax.lax.fori_loop(3, 8, lambda _, x: scan(x, w), x)

    product = 2 * 16 * 16 * 16
    assert counts_of(scan, (16, 16), (16, 16)).flops == 7 * product
    assert counts_of(nested, (16, 16), (16, 16)).flops == 5 * 7 * product


def test_a_loop_of_unknown_length_is_told():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ x / 2, x)

    counts = counts_of(halve, (16, 16))
    assert counts.unknown_loops == 1
    assert counts.flops == 2 * 16**3


def test_of_two_branches_the_dearer_one_counts():
    def branch(n, x):
        dearer = [lambda x: x @ x @ x, lambda x: x @ x]
        return jax.lax.switch(jnp.int32(jnp.sum(n)), dearer, x)

    assert counts_of(branch, (2,), (16, 16)).flops == 2 * 2 * 16**3


def test_a_convolution_counts_what_meets_data():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), [(1, 1)], dimension_numbers=("NHC", "HIO", "NHC")
        )

    # three taps at each of 10 positions, two of which would read padding
    assert counts_of(convolve, (2, 10, 4), (3, 4, 8)).flops == 2 * 2 * (3 * 10 - 2) * 4 * 8


def test_memory_traffic_of_a_product_is_its_operands_and_result():
    counts = counts_of(lambda a, b: a @ b, (256, 256), (256, 256))
    assert counts.hbm_bytes == 3 * 4 * 256 * 256


def test_an_update_in_place_moves_the_update_alone():
    def update(big, row, at):
        return jax.lax.dynamic_update_slice(big, row, (jnp.int32(at[0]), 0))

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((4096, 256), (1, 256), (1,))]
    text = jax.jit(update, donate_argnums=0).lower(*shapes).compile().as_text()
    assert count_program(text).hbm_bytes == pytest.approx(2 * 4 * 256, rel=0.1)


def test_a_slice_moves_its_own_size():
    def row(big, at):
        return jax.lax.dynamic_slice(big, (jnp.int32(at[0]), 0), (1, 256))

    assert counts_of(row, (4096, 256), (1,)).hbm_bytes == pytest.approx(2 * 4 * 256, rel=0.1)


_EIGHT = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from enat_jax.tools.hlo import count_program
from enat_jax.parallel.placement import MeshConfig, Placement

placement = Placement.of(MeshConfig(data=2, fsdp=4))

def counts(body, into, out, shape=(16, 128), dtype="float32"):
    mapped = jax.shard_map(body, placement=placement, in_specs=into, out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, dtype)).compile().as_text()
    found = count_program(text)
    return {kind: [each.count, each.bytes_by_type] for kind, each in found.collectives.items()}

both = P(("data", "fsdp"))
def swap(x):
    return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
def many(x):
    return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "fsdp") * 0.5, None), x, length=6)[0]
print(json.dumps({
    "psum": counts(lambda x: jax.lax.psum(x, ("data", "fsdp")), both, P()),
    "psum4": counts(lambda x: jax.lax.psum(x, "fsdp"), both, P("data")),
    "gather": counts(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), both, P("data")),
    "scatter": counts(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P("data"), both),
    "to_all": counts(lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), both, P("data")),
    "permute": counts(swap, both, both),
    "scan": counts(many, both, P("data")),
    "ints": counts(lambda x: jax.lax.psum(x, "fsdp"), both, P("data"), dtype="int32"),
}))
"""


@pytest.fixture(scope="module")
def on_eight_devices():
    env = {**os.environ, "JAX_PLATFORMS": "cpu",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}  # fmt: skip
    result = subprocess.run([sys.executable, "-c", _EIGHT], env=env, capture_output=True,
                            text=True, check=True)  # fmt: skip
    return json.loads(result.stdout)


_SHARE = 2 * 128 * 4  # bytes of a float32 [16, 128] on one of 8 devices


@pytest.mark.parametrize(
    ("name", "kind", "count", "sent"),
    [
        ("psum", "all-reduce", 1, 2 * 7 / 8 * _SHARE),
        ("psum4", "all-reduce", 1, 2 * 3 / 4 * _SHARE),
        ("gather", "all-gather", 1, 3 * _SHARE),
        ("scatter", "reduce-scatter", 1, 3 / 4 * 4 * _SHARE),
        ("to_all", "all-to-all", 1, 3 / 4 * _SHARE),
        ("permute", "collective-permute", 1, _SHARE),
        ("scan", "all-reduce", 6, 6 * 2 * 3 / 4 * _SHARE),
    ],
)
def test_collectives_send_what_a_ring_sends(on_eight_devices, name, kind, count, sent):
    assert on_eight_devices[name] == {kind: [count, {"f32": sent}]}


def test_bytes_are_told_by_type(on_eight_devices):
    assert on_eight_devices["ints"] == {"all-reduce": [1, {"s32": 2 * 3 / 4 * _SHARE}]}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups={{0},{1}}", 1),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", 4),
    ],
)
def test_group_sizes_are_read_in_every_spelling(groups, size):
    attributes = f", channel_id=1, {groups}, use_global_device_ids=true"
    assert group_size(attributes, devices=8) == size


# a TPU program: products are convolutions, S(1) is memory on the chip beside HBM, a loop's bound is
# in its condition, one all-gather goes on through a chain of fusions
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%start (w: bf16[4,256]) -> (bf16[4,256], bf16[64,256], u32[]) {
  %w = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(0)
  %gathered = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=7, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[4,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%going_on (x: bf16[32,256], w.1: bf16[4,256], room: bf16[64,256]) -> (bf16[32,256], bf16[64,256]) {
  %x = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(1)
  %room = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(2)
  %gathered.1 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%w.1), channel_id=7, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
  %twice = bf16[32,256]{1,0:T(8,128)(2,1)} add(%x, %x)
  ROOT %both = (bf16[32,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}) tuple(%twice, %gathered.1)
}

%product (x.1: bf16[32,256], layers: bf16[24,256,256], layer: s32[]) -> f32[32,256] {
  %x.1 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %layers = bf16[24,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %layer = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%layers, %layer, %zero, %zero), dynamic_slice_sizes={1,256,256}
  %kernel = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%one)
  ROOT %convolution = f32[32,256]{1,0:T(8,128)S(1)} convolution(%x.1, %kernel), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[32,256], bf16[24,256,256])) -> (s32[], bf16[32,256], bf16[24,256,256]) {
  %state = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[24,256,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %h = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w.2 = bf16[24,256,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %y = f32[32,256]{1,0:T(8,128)S(1)} fusion(%h, %w.2, %i), kind=kOutput, calls=%product
  %reduced = (f32[32,256]{1,0:T(8,128)S(1)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%y, /*index=1*/%h), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
  %first = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%reduced), index=1
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %step)
  ROOT %after = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[24,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%next, %first, %w.2)
}

%condition (state.1: (s32[], bf16[32,256], bf16[24,256,256])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %state.1 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[24,256,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (h.1: bf16[32,256], w.3: bf16[24,256,256], v: bf16[4,256]) -> bf16[32,256] {
  %h.1 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w.3 = bf16[24,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(2)
  %begin = s32[]{:T(128)} constant(2)
  %near = (bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[32,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%h.1)
  %here = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%near)
  %initial = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[24,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%begin, %here, %w.3)
  %loop = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[24,256,256]{2,1,0:T(8,128)(2,1)}) while(%initial), condition=%condition, body=%body
  %async-collective-start = (bf16[4,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%v), kind=kCustom, calls=%start
  %from = bf16[4,256]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %into = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %meanwhile = (bf16[32,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}) fusion(%h.1, %from, %into), kind=kCustom, calls=%going_on
  ROOT %result = bf16[32,256]{1,0:T(8,128)(2,1)} get-tuple-element(%meanwhile), index=0
}
"""  # noqa: E501


def test_a_tpu_program_is_read():
    counts = count_program(TPU)
    turns = 24 - 2
    assert counts.flops == turns * 2 * 32 * 256 * 256
    reduced, gathered = counts.collectives["all-reduce"], counts.collectives["all-gather"]
    assert reduced.count == turns
    assert reduced.bytes_by_type == {"f32": turns * 1.5 * 32 * 256 * 4,
                                     "bf16": turns * 1.5 * 32 * 256 * 2}  # fmt: skip
    assert gathered.count == 1
    assert gathered.bytes_by_type == {"bf16": 15 * 4 * 256 * 2}
    assert set(counts.collectives) == {"all-reduce", "all-gather"}


def test_a_loop_that_the_compiler_unrolled_turns_less_often():
    for step in (2, 4):
        unrolled = TPU.replace(
            "%step = s32[]{:T(128)} constant(1)", f"%step = s32[] constant({step})"
        )
        assert count_program(unrolled).collectives["all-reduce"].count == -(-22 // step)


def test_only_hbm_counts_as_memory_traffic_on_a_tpu():
    kernels = (24 - 2) * 256 * 256 * 2  # one layer's slice a turn; activations stay on the chip
    copy = 32 * 256 * 2
    gather = 4 * 256 * 2 + 64 * 256 * 2
    meanwhile = 2 * 32 * 256 * 2  # what is gathered beside it was counted where it started
    expected = kernels + copy + gather + meanwhile
    assert count_program(TPU).hbm_bytes == pytest.approx(expected, rel=1e-3)  # and a few scalars


def test_a_batched_product_is_a_dilated_convolution_on_a_tpu():
    text = """HloModule m, num_partitions=1

ENTRY %main (q: bf16[11,16,64], k: bf16[11,16,64]) -> f32[16,11,11] {
  %q = bf16[16,11,64]{2,1,0:T(8,128)} parameter(0)
  %k = bf16[16,11,64]{2,1,0:T(8,128)} parameter(1)
  ROOT %c = f32[16,11,11]{1,2,0:T(8,128)} convolution(%q, %k), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501
    assert count_program(text).flops == 2 * 16 * 11 * 11 * 64


def test_a_fusion_that_sums_and_keeps_a_share_is_a_reduce_scatter():
    text = """HloModule m, num_partitions=4

%f (p: f32[64,128], i: s32[]) -> f32[16,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %all = f32[64,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[16,128]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={16,128}
}

ENTRY %main (x: f32[64,128], n: s32[]) -> f32[16,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %r = f32[16,128]{1,0} fusion(%x, %n), kind=kCustom, calls=%f
}
"""
    (found,) = count_program(text).collectives.items()
    assert found[0] == "reduce-scatter"
    assert found[1].bytes == 3 / 4 * 64 * 128 * 4


def test_asynchronous_collectives_count_once():
    text = """HloModule m, num_partitions=8

%wrapped (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[64]) -> f32[512] {
  %x = f32[64]{0} parameter(0)
  %ags = (f32[64]{0}, f32[512]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}
  %rss = ((f32[64]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%wrapped
  %rsd = f32[8]{0} async-done(%rss)
  %ars = f32[64]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add
  %ard = f32[64]{0} all-reduce-done(%ars)
  ROOT %agd = f32[512]{0} all-gather-done(%ags)
}
"""  # noqa: E501
    counts = count_program(text)
    assert {kind: (c.count, c.bytes) for kind, c in counts.collectives.items()} == {
        "all-gather": (1, 7 * 64 * 4),
        "all-reduce": (1, 2 * 7 / 8 * 64 * 4),
        "reduce-scatter": (1, 7 / 8 * 64 * 4),
    }


def test_products_of_cublas_count():
    text = """HloModule m, num_partitions=1

ENTRY %main (a: f32[32,48], b: f32[48,64]) -> f32[32,64] {
  %a = f32[32,48]{1,0} parameter(0)
  %b = f32[48,64]{1,0} parameter(1)
  %g = (f32[32,64]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %r = f32[32,64]{1,0} get-tuple-element(%g), index=0
}
"""  # noqa: E501
    assert count_program(text).flops == 2 * 32 * 48 * 64


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        count_program("hello")


@pytest.mark.usefixtures("quick_compilation")
def test_a_training_step_does_what_its_formula_says(tiny_config):
    """And what the formula leaves out: adaLN's vectors spread over tokens by one-hot products."""
    from enat_jax.tools.programs import programs

    config = tiny_config("model.width=64", "model.num_heads=2")
    placement = Placement.of(config.mesh, jax.devices()[:1])
    (first, *_) = programs(config, placement, ("train",))
    counts = count_program(first.lower().compile().as_text())
    assert counts.flops == pytest.approx(first.model_flops, rel=0.05)
    assert counts.flops > first.model_flops
