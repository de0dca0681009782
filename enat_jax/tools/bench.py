"""Measures sampling and training of a config: speed, FLOPs, compile time, memory."""

import dataclasses
import pathlib
import platform
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from enat_jax.checkpoints.tokenizer import CHECKPOINTS, abstract_vqgan, load_vqgan
from enat_jax.config import Config, TokenizerConfig
from enat_jax.core.plans import padding
from enat_jax.errors import UserError
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.flops import paper_gflops
from enat_jax.models.flops import generation_flops, step_flops, training_flops
from enat_jax.models.networks import make_network
from enat_jax.parallel.accelerators import accelerator_of
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.sampling.sampler import Layers, Sampler
from enat_jax.tokenizers.flops import decode_flops, encode_flops
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from enat_jax.training.programs import TrainingPrograms

_MATMUL = 2048
_WHAT = ("sample", "train", "encode", "decode", "flops")


def bench(
    config: Config,
    *,
    what: Sequence[str] = ("sample",),
    batch_sizes: Sequence[int] = (1,),
    dtypes: Sequence[str] = (),
    layers: Layers = "auto",
    repeats: int = 5,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Benchmarks a config with random weights; every figure is a median over `repeats` calls.

    Each timed call stands beside a float32 matrix product of 2048 cubed timed just before and
    after it, so that the ratio of the two rates survives a machine whose speed wanders.

    Args:
        config: the experiment.
        what: any of `sample`, `train`, `encode`, `decode` and `flops`. `encode` and `decode` are
            the VQGAN's, at the config's grid: of the sizes in `tokenizer.weights`, or if nothing is
            there MaskGIT's. `flops` runs nothing: it is what the config's strategy costs by
            formula, in our unit and in the papers'.
        batch_sizes: images per call of the sampler.
        dtypes: activation types to measure; the config's by default.
        layers: how the sampler lays out depth, see `Sampler`.
        repeats: timed calls of each case.
        say: called with a line per case.

    Raises:
        UserError: unknown `what` or type, or a batch size below 1.
    """
    problems = [f"what = {each}, must be one of {', '.join(_WHAT)}" for each in what
                if each not in _WHAT]  # fmt: skip
    problems += [f"dtype = {each}, must be float32 or bfloat16" for each in dtypes
                 if each not in ("float32", "bfloat16")]  # fmt: skip
    problems += [f"model.{name} = 0 is read from records: give a number"
                 for name in ("num_classes", "codebook_size")
                 if getattr(config.model, name) == 0]  # fmt: skip
    problems += [f"batch size = {size}, must be at least 1" for size in batch_sizes if size < 1]
    if problems:
        raise UserError("bench: " + "; ".join(problems))
    kind = jax.devices()[0].device_kind
    result: dict[str, Any] = {
        "device": kind,
        "devices": jax.device_count(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "jax": jax.__version__,
        "parameters": int(_parameter_count(config)),
        "cases": [],
    }
    for dtype in dtypes or [config.model.dtype]:
        cfg = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        cases = [_count_flops(cfg)] if "flops" in what else []
        if "train" in what:
            cases.append(_bench_train(cfg, repeats))
        if "sample" in what:
            cases += _bench_sample(cfg, batch_sizes, layers, repeats)
        for way in ("encode", "decode"):
            if way in what:
                cases += [_bench_vqgan(cfg, way, dtype, size, repeats) for size in batch_sizes]
        for case in cases:
            say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                          for k, v in case.items()))  # fmt: skip
        result["cases"] += cases
    return result


def _count_flops(config: Config) -> dict[str, Any]:
    model = config.model
    layout, _ = GenerationProgram(config, Placement.of(config.mesh), None).plan()
    plans = [plan for bucket in layout.buckets for plan in bucket.plans]
    case = {
        "what": "flops",
        "dtype": model.dtype,
        "steps": layout.steps,
        "gigaflop_per_image": generation_flops(model, layout.buckets, padded=False) / 1e9,
    }
    if isinstance(model, ENATConfig):
        case["paper_gigamac_per_image"] = paper_gflops(model, plans)
    return case


def _bench_sample(
    config: Config, batch_sizes: Sequence[int], layers: Layers, repeats: int
) -> list[dict[str, Any]]:
    placement = Placement.of(config.mesh)
    init = jax.jit(lambda: nnx.split(make_network(config.model, rngs=nnx.Rngs(0)), nnx.Param)[1])
    bare = dataclasses.replace(config, tokenizer=TokenizerConfig(grid=config.tokenizer.grid))
    sampler = Sampler(bare, init(), placement=placement, layers=layers)
    layout, traced = sampler.plan()
    flops = generation_flops(config.model, layout.buckets, padded=False)
    cases = []
    for batch in batch_sizes:
        rows, whole = placement.batch, placement.replicated
        classes = jax.device_put(jnp.arange(batch) % config.model.num_classes, rows)
        images = jax.device_put(jnp.arange(batch), rows)
        inputs = (
            sampler.params,
            (),
            classes,
            images,
            *jax.device_put((traced, jax.random.key(0)), whole),
        )
        start = time.perf_counter()
        program = sampler.program.run.lower(*inputs, layout=layout, output="token_ids").compile()
        compile_seconds = time.perf_counter() - start
        seconds, ratio = _timed(lambda p=program, i=inputs: p(*i), batch * flops, repeats)
        cases.append(
            {
                "what": "sample",
                "dtype": config.model.dtype,
                "batch_size": batch,
                "steps": layout.steps,
                "bodies": len(layout.buckets),
                "padding": padding(layout.buckets, lambda p: step_flops(config.model, p)),
                "gigaflop_per_image": flops / 1e9,
                "images_per_second": batch / seconds,
                **_rates(batch * flops, seconds, ratio),
                "compile_seconds": compile_seconds,
                **_memory(program),
            }
        )
    return cases


def _bench_train(config: Config, repeats: int) -> dict[str, Any]:
    placement = Placement.of(config.mesh)
    run = TrainingPrograms(config, placement)
    batch = config.train.batch_size
    rng = np.random.default_rng(0)
    rows = placement.batch
    shape = (batch, config.model.length)
    tokens = jax.device_put(rng.integers(config.model.codebook_size, size=shape).astype("i4"), rows)
    classes = jax.device_put(rng.integers(config.model.num_classes, size=batch).astype("i4"), rows)
    key = jax.device_put(jax.random.key(0), placement.replicated)
    state = run.initial_state()
    start = time.perf_counter()
    program = run.programs[0].lower(state, tokens, classes, key).compile()
    compile_seconds = time.perf_counter() - start

    def step() -> Any:
        nonlocal state
        state, metrics = program(state, tokens, classes, key)
        return metrics

    flops = batch * training_flops(config.model, run.plans[0])
    seconds, ratio = _timed(step, flops, repeats)
    return {
        "what": "train",
        "dtype": config.model.dtype,
        "batch_size": batch,
        "remat": config.model.remat,
        "programs": len(run.programs),
        "gigaflop_per_image": flops / batch / 1e9,
        "steps_per_second": 1 / seconds,
        "images_per_second": batch / seconds,
        **_rates(flops, seconds, ratio),
        "compile_seconds": compile_seconds,
        **_memory(program),
    }


def _bench_vqgan(config: Config, way: str, dtype: str, batch: int, repeats: int) -> dict[str, Any]:
    weights = pathlib.Path(config.tokenizer.weights)
    there = config.tokenizer.weights and (weights / CHECKPOINTS).is_dir()
    cfg = load_vqgan(weights)[0] if there else VQGANConfig()
    cfg = dataclasses.replace(cfg, dtype=dtype)
    grid = config.tokenizer.grid
    graphdef, _ = abstract_vqgan(cfg)
    params = jax.jit(lambda: nnx.split(VQGAN(cfg, rngs=nnx.Rngs(0)), nnx.Param)[1])()
    placement = Placement.of(config.mesh)
    sides = [side * cfg.patch for side in grid]
    decoding = way == "decode"
    token_ids, images = jnp.zeros((batch, grid[0] * grid[1]), jnp.int32), jnp.ones((1, 1, 1, 3))
    data = token_ids if decoding else jnp.broadcast_to(images, (batch, *sides, 3))
    params, data = jax.device_put((params, data), (placement.replicated, placement.batch))

    def run(params: nnx.State, data: jax.Array) -> jax.Array:
        vqgan = nnx.merge(graphdef, params)
        return vqgan.decode(data, grid) if decoding else vqgan.encode(data)

    start = time.perf_counter()
    program = jax.jit(run).lower(params, data).compile()
    compile_seconds = time.perf_counter() - start
    flops = batch * (decode_flops if decoding else encode_flops)(cfg, sides[0])
    seconds, ratio = _timed(lambda: program(params, data), flops, repeats)
    return {
        "what": way,
        "dtype": dtype,
        "batch_size": batch,
        "pixels": sides[0],
        "gigaflop_per_image": flops / batch / 1e9,
        "images_per_second": batch / seconds,
        **_rates(flops, seconds, ratio),
        "compile_seconds": compile_seconds,
        **_memory(program),
    }


def _timed(call: Callable[[], Any], flops: float, repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and median of its FLOP rate over the matrix product's."""
    a = jnp.ones((_MATMUL, _MATMUL))
    product = jax.jit(lambda a: a @ a)

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    def matmul_rate() -> float:
        return 2.0 * _MATMUL**3 / float(np.median([seconds(lambda: product(a)) for _ in range(5)]))

    seconds(call)  # not timed: the first call touches memory for the first time
    seconds(lambda: product(a))
    times, ratios = [], []
    for _ in range(repeats):
        before = matmul_rate()
        times.append(seconds(call))
        ratios.append(flops / times[-1] / (0.5 * (before + matmul_rate())))
    return float(np.median(times)), float(np.median(ratios))


def _rates(flops: float, seconds: float, ratio: float) -> dict[str, Any]:
    accelerator = accelerator_of(jax.devices()[0].device_kind)
    rate = flops / seconds
    return {
        "seconds": seconds,
        "gigaflop_per_second": rate / 1e9,
        "of_float32_matmul_rate": ratio,
        "mfu": rate / (accelerator.flops * jax.device_count()) if accelerator else None,
    }


def _memory(program: Any) -> dict[str, Any]:
    """Bytes on a device where it tells, and the program's own account of what it needs."""
    stats = jax.devices()[0].memory_stats() or {}
    analysis = program.memory_analysis()
    account = {
        f"{name}_gib": getattr(analysis, f"{name}_size_in_bytes", 0) / 2**30
        for name in ("argument", "output", "temp")
    }
    peak = (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"peak_memory_gib": peak / 2**30, **account}


def _parameter_count(config: Config) -> int:
    abstract = nnx.eval_shape(lambda: make_network(config.model, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
