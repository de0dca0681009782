"""Measures sampling and training of a config: speed, FLOPs, compile time, memory."""

import dataclasses
import pathlib
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from enat_jax.checkpoints.tokenizer import CHECKPOINTS, load_vqgan
from enat_jax.config import Config, TokenizerConfig
from enat_jax.errors import UserError
from enat_jax.models.captions import condition_shapes
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.flops import paper_gflops
from enat_jax.models.flops import generation_flops, padding
from enat_jax.models.networks import make_network
from enat_jax.parallel.accelerators import accelerator_of
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram, Layers, abstract_params
from enat_jax.sampling.sampler import Sampler
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from enat_jax.tools.compile import unknown_sizes
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
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Benchmarks a config with random weights; every figure is a median over `repeats` calls.

    Each timed call stands beside a float32 matrix product of 2048 cubed timed just before and
    after it, so that the ratio of the two rates survives a machine whose speed wanders.
    Of `what`, `encode` and `decode` are the VQGAN's, at the config's grid: of the sizes in
    `tokenizer.weights`, or if nothing is there MaskGIT's. `flops` runs nothing: it is what the
    config's strategy costs by formula, in our unit and in the papers'. `dtypes` are of activations,
    the config's by default; `layers` is as `Sampler` has it.

    Raises:
        UserError: unknown `what` or type, or a batch size below 1.
    """
    problems = [f"what = {each}, must be one of {', '.join(_WHAT)}" for each in what
                if each not in _WHAT]  # fmt: skip
    problems += [f"dtype = {each}, must be float32 or bfloat16" for each in dtypes
                 if each not in ("float32", "bfloat16")]  # fmt: skip
    problems += [f"batch size = {size}, must be at least 1" for size in batch_sizes if size < 1]
    if problems := problems + unknown_sizes(config):
        raise UserError("bench: " + "; ".join(problems))
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "jax": jax.__version__,
        "parameters": sum(x.size for x in jax.tree.leaves(abstract_params(config.model)[1])),
        "cases": [],
    }
    for dtype in dtypes or [config.model.dtype]:
        cfg = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        for case in _cases(cfg, what, batch_sizes, layers, repeats):
            log(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                          for k, v in case.items()))  # fmt: skip
            result["cases"].append(case)
    return result


def _cases(
    config: Config, what: Sequence[str], batch_sizes: Sequence[int], layers: Layers, repeats: int
) -> Iterator[dict[str, Any]]:
    if "flops" in what:
        yield _count_flops(config)
    if "train" in what:
        yield _bench_train(config, repeats)
    if "sample" in what:
        model = config.model
        init = jax.jit(lambda: nnx.split(make_network(model, rngs=nnx.Rngs(0)), nnx.Param)[1])
        bare = dataclasses.replace(
            config,
            tokenizer=TokenizerConfig(grid=config.tokenizer.grid),
            sample=dataclasses.replace(config.sample, batch_size=max(batch_sizes)),
        )
        sampler = Sampler(bare, init(), layers=layers)
        for size in batch_sizes:
            yield _bench_sample(sampler, size, repeats)
    for way in ("encode", "decode"):
        for size in batch_sizes if way in what else ():
            yield _bench_vqgan(config, way, size, repeats)


def _count_flops(config: Config) -> dict[str, Any]:
    layout, _ = GenerationProgram(config, Placement.of(config.mesh), None).plan()
    flops = generation_flops(config.model, layout.buckets, padded=False)
    case = {"what": "flops", "dtype": config.model.dtype, "steps": layout.steps}
    case["gigaflop_per_image"] = flops / 1e9
    if isinstance(config.model, ENATConfig):
        plans = [plan for bucket in layout.buckets for plan in bucket.plans]
        case["paper_gigamac_per_image"] = paper_gflops(config.model, plans)
    return case


def _bench_train(config: Config, repeats: int) -> dict[str, Any]:
    run = TrainingPrograms(config, Placement.of(config.mesh))
    rng, batch = np.random.default_rng(0), config.train.batch_size
    tokens, conditions = run.arguments[1:3]
    ids = rng.integers(config.model.codebook_size, size=tokens.shape, dtype=np.int32)
    condition = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), conditions)
    data = jax.device_put((ids, condition), run.placement.batch)
    state, key = run.initial_state(), run.placement.put(jax.random.key(0))

    def step(program: Any) -> Any:
        nonlocal state
        state, metrics = program(state, *data, key)
        return metrics

    lowered = run.programs[0].lower(*run.arguments)
    case = _measured("train", config, batch, lowered, step, run.flops, repeats)
    counts = {"remat": config.model.remat, "programs": len(run.programs), "padding": run.padding}
    return {**case, **counts, "steps_per_second": 1 / case["seconds"]}


def _bench_sample(sampler: Sampler, images: int, repeats: int) -> dict[str, Any]:
    config, program, placement = sampler.config, sampler.program, sampler.placement
    (layout, traced), output, batch = program.plan(), "token_ids", program.batch_size(images)
    shapes = condition_shapes(config.model, batch)  # of the first class, or of empty captions
    condition = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    by_image = placement.put((condition, np.arange(batch, dtype=np.int32)), placement.batch)
    given = sampler.params, (), *by_image, *placement.put((traced, jax.random.key(0)))
    lowered = program.jitted(layout, output).lower(*given)
    flops = generation_flops(config.model, layout.buckets, padded=False)
    return {
        **_measured("sample", config, batch, lowered, lambda run: run(*given), flops, repeats),
        "steps": layout.steps,
        "bodies": len(layout.buckets),
        "padding": padding(config.model, layout.buckets),
    }


def _bench_vqgan(config: Config, way: str, batch: int, repeats: int) -> dict[str, Any]:
    weights, grid = pathlib.Path(config.tokenizer.weights), config.tokenizer.grid
    there = config.tokenizer.weights and (weights / CHECKPOINTS).is_dir()
    cfg = load_vqgan(weights)[0] if there else VQGANConfig()
    cfg = dataclasses.replace(cfg, dtype=config.model.dtype)
    graphdef, params = nnx.split(jax.jit(lambda: VQGAN(cfg, rngs=nnx.Rngs(0)))(), nnx.Param)
    sides, decoding = [side * cfg.patch for side in grid], way == "decode"
    ids, images = np.zeros((batch, grid[0] * grid[1]), np.int32), np.ones((batch, *sides, 3))
    data = ids if decoding else images.astype(np.float32)
    placement = Placement.of(config.mesh)
    given = (placement.put(params), placement.put(data, placement.batch))

    def code(params: nnx.State, data: jax.Array) -> jax.Array:
        vqgan = nnx.merge(graphdef, params)
        return vqgan.decode(data, grid) if decoding else vqgan.encode(data)

    lowered = jax.jit(code).lower(*given)
    cost: Any = lowered.cost_analysis()
    flops = cost["flops"] / batch  # nearly all of convolutions
    case = _measured(way, config, batch, lowered, lambda run: run(*given), flops, repeats)
    return {**case, "pixels": sides[0]}


def _measured(
    what: str, config: Config, batch: int, lowered: jax.stages.Lowered,
    call: Callable[[Any], Any], flops: float, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Compiles a program of `flops` per image, and times `call`, which is given what is to run."""
    start = time.perf_counter()
    program = lowered.compile()
    compile_seconds = time.perf_counter() - start
    seconds, ratio = _timed(lambda: call(program), batch * flops, repeats)
    rate = batch * flops / seconds
    accelerator = accelerator_of(jax.devices()[0].device_kind)
    # bytes on a device where it tells, and the program's own account of what it needs
    stats, account = jax.devices()[0].memory_stats() or {}, program.memory_analysis()
    peak = stats.get("peak_bytes_in_use")
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "what": what,
        "dtype": config.model.dtype,
        "batch_size": batch,
        "gigaflop_per_image": flops / 1e9,
        "images_per_second": batch / seconds,
        "seconds": seconds,
        "gigaflop_per_second": rate / 1e9,
        "of_float32_matmul_rate": ratio,
        "mfu": rate / (accelerator.flops * jax.device_count()) if accelerator else None,
        "compile_seconds": compile_seconds,
        "peak_memory_gib": peak / 2**30,
        "argument_gib": getattr(account, "argument_size_in_bytes", 0) / 2**30,
        "output_gib": getattr(account, "output_size_in_bytes", 0) / 2**30,
        "temp_gib": getattr(account, "temp_size_in_bytes", 0) / 2**30,
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
