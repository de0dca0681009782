"""The generation loop: reveals an image's tokens step by step under a strategy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int, PyTree

from enat_jax.core.network import Network, RowPlan, Tokens
from enat_jax.core.plans import Bucket, Plan, generation_plans, group_into_buckets
from enat_jax.core.strategy import GenerationStrategy

Noise = Callable[
    [Int[Array, ""], Int[Array, "b m"]], tuple[Float[Array, "b m v"], Float[Array, "b m"]]
]
"""(step, positions) -> standard Gumbel noise on the logits and on the confidence there."""


class TracedStrategy(NamedTuple):
    """A strategy's numbers as the loop reads them: traced, one per step.

    Changing them never recompiles, as long as the counts fit the layout's shapes.
    """

    step: Int[Array, " t"]
    previous: Int[Array, " t"]
    new: Int[Array, " t"]
    masked: Int[Array, " t"]
    choice_temperature: Float[Array, " t"]
    sampling_temperature: Float[Array, " t"]
    guidance_scale: Float[Array, " t"]
    priority: Float[Array, "t l"]  # of each position, see `core.orders`
    logit_ranking: Float[Array, " t"]  # 1 where the confidence is the sampled id's logit, else 0


@dataclass(frozen=True)
class Layout:
    """The static side of a strategy: image length and the buckets of its steps."""

    length: int
    buckets: tuple[Bucket, ...]

    @property
    def steps(self) -> int:
        """Number of network calls."""
        return sum(len(bucket.plans) for bucket in self.buckets)


def plan_generation(
    strategy: GenerationStrategy,
    length: int,
    cost: Callable[[Plan], float],
    *,
    reuse: bool = True,
    reads_masked: bool = False,
    buckets: int | None = None,
    max_padding: float = 0.15,
) -> tuple[Layout, TracedStrategy]:
    """Splits a strategy into what is compiled and what is traced.

    The unconditional branch is left out of a step without guidance if no later step reads the
    features it would have produced there. `reuse` says whether a step reads features of earlier
    ones, `reads_masked` whether also those of tokens that were masked. The others are as in
    `plans.group_into_buckets`.

    Raises:
        ValueError: a strategy that does not fit the length.
    """
    plans = generation_plans(strategy.masked_counts(length), length, reuse=reuse)
    guided = guided_steps(plans, strategy.guidance_scale, reads_masked=reuse and reads_masked)
    layout = Layout(
        length, group_into_buckets(plans, guided, cost, buckets=buckets, max_padding=max_padding)
    )
    return layout, trace_strategy(strategy, plans)


def guided_steps(
    plans: Sequence[Plan],
    guidance_scale: Sequence[float] | np.ndarray,
    *,
    reads_masked: bool = False,
) -> list[bool]:
    """Per step, whether the unconditional branch has to run."""
    guided = []
    read_later = False  # whether a later step reads the unconditional branch's features
    for plan, scale in zip(reversed(plans), reversed(guidance_scale), strict=True):
        runs = scale != 0 or (read_later and (reads_masked or plan.previous + plan.new > 0))
        guided.append(bool(runs))
        reads = plan.previous > 0 or (reads_masked and plan.new > 0)
        read_later = read_later or (runs and reads)
    return guided[::-1]


def trace_strategy(strategy: GenerationStrategy, plans: Sequence[Plan]) -> TracedStrategy:
    """A strategy's traced numbers for given plans."""
    priority = np.zeros(sum(plans[0])) if strategy.priority is None else strategy.priority
    priority = np.broadcast_to(priority, (len(plans), sum(plans[0])))
    previous, new, masked = (jnp.array(counts, jnp.int32) for counts in zip(*plans, strict=True))
    return TracedStrategy(
        step=jnp.arange(len(plans)),
        previous=previous,
        new=new,
        masked=masked,
        choice_temperature=jnp.asarray(strategy.choice_temperature, jnp.float32),
        sampling_temperature=jnp.asarray(strategy.sampling_temperature, jnp.float32),
        guidance_scale=jnp.asarray(strategy.guidance_scale, jnp.float32),
        priority=jnp.asarray(priority, jnp.float32),
        logit_ranking=jnp.full(len(plans), strategy.ranking == "logit", jnp.float32),
    )


def image_noise(key: jax.Array, image_ids: Int[Array, " b"], codebook_size: int) -> Noise:
    """Noise that belongs to (key, image, step, position), whatever is computed beside it."""
    image_keys = jax.vmap(lambda image: jax.random.fold_in(key, image))(image_ids)

    def noise(
        step: Int[Array, ""], positions: Int[Array, "b m"]
    ) -> tuple[Float[Array, "b m v"], Float[Array, "b m"]]:
        def at(image_key: jax.Array, position: Int[Array, ""]) -> Float[Array, " w"]:
            step_key = jax.random.fold_in(image_key, step)
            position_key = jax.random.fold_in(step_key, position)
            return jax.random.gumbel(position_key, (codebook_size + 1,))

        both = jax.vmap(jax.vmap(at, in_axes=(None, 0)))(image_keys, positions)
        return both[..., :-1], both[..., -1]

    return noise


class State(NamedTuple):
    """What one step hands to the next.

    Attributes:
        order: positions in the order they were revealed, then the masked ones, then padding.
        token_ids: the id at `order`; meaningless at masked positions.
        memory: the network's, both branches of an image side by side in the batch.
    """

    order: Int[Array, "b l"]
    token_ids: Int[Array, "b l"]
    memory: PyTree


class StepRecord(NamedTuple):
    """What one step decided, in the order in which the step saw the masked tokens.

    Attributes:
        positions: masked positions, `[b m]`; padding beyond the step's masked count.
        logits: guided log-probabilities there, float32.
        conditional: logits of the conditional branch.
        unconditional: logits of the unconditional branch, or the conditional's where not run.
        sampled_ids: the sampled tokens.
        confidence: what positions are ranked by.
        order: the order after the step.
    """

    positions: Int[Array, "b m"]
    logits: Float[Array, "b m v"]
    conditional: Float[Array, "b m v"]
    unconditional: Float[Array, "b m v"]
    sampled_ids: Int[Array, "b m"]
    confidence: Float[Array, "b m"]
    order: Int[Array, "b l"]


def generate(
    network: Network,
    condition: PyTree,
    strategy: TracedStrategy,
    noise: Noise,
    *,
    layout: Layout,
) -> tuple[Int[Array, "b l"], list[StepRecord]]:
    """Generates the token ids of images, in raster order, and per bucket its steps' records.

    The condition's leaves are `[b ...]`, such as class ids. A jitted caller that does not return
    the records pays nothing for them.
    """
    batch = jax.tree.leaves(condition)[0].shape[0]
    branches = 2 if any(bucket.guided for bucket in layout.buckets) else 1
    condition = jax.tree.map(lambda x: x[:, None], condition)  # one image a row
    both = jax.tree.map(
        lambda given, null: rearrange([given, null][:branches], "r b ... -> (b r) ..."),
        condition,
        network.null_condition(condition),
    )
    embedded = network.embed_condition(both)

    reach = [(p.previous, bucket.shape) for bucket in layout.buckets for p in bucket.plans]
    capacity = 0
    if any(shape.previous for _, shape in reach):
        capacity = max(max(before + shape.new, shape.previous) for before, shape in reach)
    room = max(layout.length, *(before + s.new + s.masked for before, s in reach))
    order = jnp.minimum(jnp.arange(room), layout.length - 1)
    state = State(
        order=repeat(order, "l -> b l", b=batch),
        token_ids=jnp.zeros((batch, room), jnp.int32),
        memory=network.initial_memory(branches * batch, capacity),
    )

    records = []
    first = 0
    for bucket in layout.buckets:
        steps = jax.tree.map(lambda x, a=first, b=bucket: x[a : a + len(b.plans)], strategy)
        first += len(bucket.plans)
        body = partial(_step, network, embedded, noise, bucket, branches)
        if len(bucket.plans) == 1:
            state, record = body(state, jax.tree.map(lambda x: x[0], steps))
            record = jax.tree.map(lambda x: x[None], record)
        else:
            state, record = jax.lax.scan(body, state, steps)
        records.append(record)

    where = jnp.argsort(state.order[:, : layout.length], axis=1)
    return jnp.take_along_axis(state.token_ids, where, axis=1), records


def _step(
    network: Network,
    condition: PyTree,
    noise: Noise,
    bucket: Bucket,
    branches: int,
    state: State,
    step: TracedStrategy,
) -> tuple[State, StepRecord]:
    """Predicts the masked tokens, samples them, and reveals the most confident ones."""
    shape = bucket.shape
    counts: Any = None if bucket.exact else Plan(*cast(Any, (step.previous, step.new, step.masked)))
    start = shape if counts is None else counts  # where the new and the masked tokens begin
    visible = start.previous + start.new

    def take(x: Array, begin: Any, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

    new = [take(x, start.previous, shape.new) for x in (state.token_ids, state.order)]
    positions = take(state.order, visible, shape.masked)

    running = 2 if bucket.guided else 1
    tokens = Tokens(*(jnp.repeat(x, running, axis=0) for x in (*new, positions)))
    kept = slice(None, None, branches // running)  # the conditional rows, where only they run
    logits, memory = network.predict(
        jax.tree.map(lambda x: x[kept], condition),
        jax.tree.map(lambda x: x[kept], state.memory),
        tokens,
        RowPlan((shape,), None if counts is None else (counts,)),
    )
    if running < branches:  # the unconditional branch had nothing to add to its memory
        memory = jax.tree.map(lambda old, x: old.at[kept].set(x), state.memory, memory)
    state = state._replace(memory=memory)

    logits = rearrange(logits, "(b r) m v -> r b m v", r=running)
    conditional, unconditional = logits[0], logits[-1]
    if bucket.guided:
        guided = conditional + step.guidance_scale * (conditional - unconditional)
    else:
        guided = conditional
    log_probs = jax.nn.log_softmax(guided, axis=-1)
    token_noise, choice_noise = noise(step.step, positions)
    sampled = jnp.argmax(log_probs / step.sampling_temperature + token_noise, axis=-1)
    sampled = sampled.astype(jnp.int32)
    confidence = jnp.take_along_axis(log_probs, sampled[..., None], axis=-1)[..., 0]
    confidence = confidence + step.logit_ranking * (guided - log_probs)[..., 0]
    confidence = confidence + step.choice_temperature * choice_noise + step.priority[positions]
    if counts is not None:  # padding ranks last
        confidence = jnp.where(jnp.arange(shape.masked) < counts.masked, confidence, -jnp.inf)

    _, ranked, ranked_ids = jax.lax.sort((-confidence, positions, sampled), num_keys=1)
    put = jax.lax.dynamic_update_slice_in_dim
    state = state._replace(
        order=put(state.order, ranked, visible, axis=1),
        token_ids=put(state.token_ids, ranked_ids, visible, axis=1),
    )
    return state, StepRecord(
        positions, log_probs, conditional, unconditional, sampled, confidence, state.order
    )
