import dataclasses
import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import enat_jax
from enat_jax.config import Config, SampleConfig, TokenizerConfig
from enat_jax.core.schedules import StrategyConfig
from enat_jax.errors import UserError
from enat_jax.models.enat.network import ENATConfig
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.tokenizers.vqgan import VQGANConfig, VQGANTokenizer, abstract_vqgan

SMALL = Config(
    model=ENATConfig(length=4, codebook_size=8, num_classes=3, width=16, num_heads=2,
                     encoder_depth=2, decoder_depth=2, dtype="bfloat16"),
    tokenizer=TokenizerConfig(name="vqgan", grid=(2, 2)),
    strategy=StrategyConfig(steps=2),
    sample=SampleConfig(batch_size=6),
)  # fmt: skip


def small_program(placement=None, layers="auto", tokenizer=None):
    config = dataclasses.replace(SMALL, tokenizer=TokenizerConfig(grid=(2, 2)))
    placement = placement or Placement.of(MeshConfig())
    return GenerationProgram(config, placement, tokenizer, layers=layers)


def test_the_described_program_is_the_one_that_samples(trained):
    model = enat_jax.load(trained)
    described = GenerationProgram(model.config, model.placement, model.tokenizer)
    program = described.lower(output="token_ids", batch_size=2).compile()
    assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(jnp.shape, described.params)
    ids = [
        model.placement.put(np.array(each, np.int32), model.placement.batch)
        for each in ([3, 7], [0, 1])
    ]
    found = program(model.params, (), *ids, described.plan()[1], jax.random.key(5))
    (expected,) = model.token_batches([3, 7], seed=5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layers", ["stacked", "unstacked"])
def test_weights_are_described_as_they_are_taken(layers):
    program = small_program(layers=layers)
    made = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), program.stored)
    taken = program.prepare(made)
    for described, array in zip(
        jax.tree.leaves(program.params), jax.tree.leaves(taken), strict=True
    ):
        assert (described.shape, described.dtype) == (array.shape, array.dtype)
        assert described.sharding == array.sharding
    kernels = [x for path, x in jax.tree.leaves_with_path(taken)
               if "kernel" in jax.tree_util.keystr(path)]  # fmt: skip
    assert {kernel.dtype for kernel in kernels} == {jnp.dtype("bfloat16")}
    assert len(kernels) > (20 if layers == "unstacked" else 5)


def test_shapes_alone_are_compiled_with_a_vqgan_that_is_not_there():
    small = VQGANConfig(channels=2, channel_multipliers=(1, 2), num_res_blocks=1,
                        latent_channels=4, codebook_size=8, norm_groups=1)  # fmt: skip
    program = small_program(tokenizer=VQGANTokenizer(small, abstract_vqgan(small)[1], digest=""))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(program.params))
    compiled = program.lower(output="uint8").compile()
    (images,) = jax.tree.leaves(compiled.out_info)
    assert (images.shape, images.dtype) == ((6, 4, 4, 3), np.uint8)


def test_a_batch_is_what_the_devices_can_share():
    devices = jax.devices()[:1] * 4
    program = small_program(Placement.of(MeshConfig(data=4), devices))
    assert (program.batch_size(), program.batch_size(1), program.batch_size(5)) == (8, 4, 8)
    (_, _, ids, *_), _ = program.lower(output="token_ids").args_info
    assert ids.shape == (8,)


def test_images_without_a_tokenizer_are_refused():
    with pytest.raises(UserError, match="gives token ids, not images"):
        small_program().lower(output="uint8")
    assert small_program().lower(output="token_ids")


FOR_A_TPU = """
from jax.experimental import topologies
import tests.sampling.test_program as t
from enat_jax.parallel.placement import MeshConfig, Placement
described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
placement = Placement.of(MeshConfig(data=2, fsdp=2), described.devices)
compiled = t.small_program(placement).lower(output="token_ids").compile()
assert compiled.memory_analysis().argument_size_in_bytes > 0
"""


def test_it_compiles_for_devices_that_are_not_there():
    pytest.importorskip("libtpu")
    env = {"PYTHONPATH": ".:tests", "PATH": "", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
           "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-c", FOR_A_TPU], env=env, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


def test_programs_of_layouts_long_out_of_use_are_let_go():
    program = small_program()
    layouts = [
        program.plan(guidance_scale=scale, steps=steps)[0]
        for steps in (1, 2, 3, 4)
        for scale in (0.0, 2.0)
    ]
    layouts += [dataclasses.replace(layout, length=5) for layout in layouts]
    layouts = list(dict.fromkeys(layouts))
    kept = [program.jitted(layout, "token_ids") for layout in layouts[-8:]]
    first = weakref.ref(program.jitted(layouts[0], "token_ids"))
    assert [program.jitted(layout, "token_ids") for layout in layouts[-8:]] != kept  # one anew
    gc.collect()
    assert first() is None
    again = [program.jitted(layout, "token_ids") for layout in layouts[-8:]]
    assert again == [program.jitted(layout, "token_ids") for layout in layouts[-8:]]
