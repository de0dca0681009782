import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from enat_jax.tokenizers.discriminator import Discriminator, DiscriminatorConfig
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from enat_jax.training.tokenizer_step import (
    LossConfig,
    Networks,
    TokenizerState,
    codebook_from_images,
    initial_codebook,
    perplexity,
    restart_codes,
    straight_through,
    tokenizer_step,
    vqgan_loss,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = VQGANConfig(channels=4, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4,
                  codebook_size=8, norm_groups=1)  # fmt: skip
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def split():
    return nnx.split(VQGAN(CFG, rngs=nnx.Rngs(0)), nnx.Param)


def pixels(seed=0, count=3):
    return jax.random.uniform(jax.random.key(seed), (count, 8, 8, 3))


def photographs(seed=0, count=3):
    return (255 * pixels(seed, count)).astype(jnp.uint8)


class TestLosses:
    def test_each_term_is_its_formula(self, split):
        model, images = nnx.merge(*split), pixels()
        cfg = LossConfig(l1=2.0, l2=3.0, codebook=5.0, commitment=7.0, lpips=11.0, adversarial=13.0)
        loss, outcome = vqgan_loss(
            model,
            images,
            cfg,
            lpips=lambda a, b: jnp.max(jnp.abs(a - b), axis=(1, 2, 3)),
            discriminator=lambda x: x[..., 0],
        )
        latents = np.asarray(model.encoder(images))
        codebook = np.asarray(model.codebook[...])
        distances = ((latents[..., None, :] - codebook) ** 2).sum(-1)
        codes = codebook[distances.argmin(-1)]
        made = np.asarray(model.decoder(jnp.asarray(codes)))
        error = np.asarray(made - images)
        expected = {
            "l1": np.abs(error).mean(),
            "l2": (error**2).mean(),
            "codebook": ((latents - codes) ** 2).mean(),
            "commitment": ((latents - codes) ** 2).mean(),
            "lpips": np.abs(error).max(axis=(1, 2, 3)).mean(),
            "adversarial": -made[..., 0].mean(),
        }
        assert outcome.terms.keys() == expected.keys()
        for name, value in expected.items():
            assert float(outcome.terms[name]) == pytest.approx(value, rel=1e-4), name
        total = np.dot([2, 3, 5, 7, 11, 13], list(expected.values()))
        assert float(loss) == pytest.approx(total, rel=1e-4)
        np.testing.assert_array_equal(outcome.token_ids, distances.argmin(-1))
        np.testing.assert_allclose(outcome.reconstruction, made, atol=1e-5)

    def test_the_gradient_at_the_codes_goes_straight_through_to_the_latents(self):
        latents, codes, weight = jax.random.normal(KEY, (3, 1, 2, 2, 4))
        value, (to_latents, to_codes) = jax.value_and_grad(
            lambda z, q: jnp.sum(weight * straight_through(z, q)), argnums=(0, 1)
        )(latents, codes)
        assert float(value) == pytest.approx(float(jnp.sum(weight * codes)), rel=1e-5)
        np.testing.assert_array_equal(to_latents, weight)
        np.testing.assert_array_equal(to_codes, jnp.zeros_like(codes))

    def test_each_term_teaches_its_own_part(self, split):
        graphdef, params = split

        def terms(params):
            _, outcome = vqgan_loss(nnx.merge(graphdef, params), pixels(), LossConfig())
            return jnp.stack([outcome.terms[name] for name in ("l1", "codebook", "commitment")])

        grads = jax.jit(jax.jacrev(terms))(params)
        taught = {
            part: [any(np.any(leaf[term]) for leaf in leaves(grads[part])) for term in range(3)]
            for part in ("encoder", "codebook", "decoder")
        }
        assert taught == {
            "encoder": [True, False, True],
            "codebook": [False, True, False],
            "decoder": [True, False, False],
        }

    def test_before_the_codebook_begins_the_decoder_sees_the_latents(self, split):
        model, images = nnx.merge(*split), pixels()
        _, outcome = vqgan_loss(model, images, LossConfig(), quantised=False)
        made = model.decoder(model.encoder(images))
        assert set(outcome.terms) == {"l1", "l2"}
        np.testing.assert_allclose(outcome.reconstruction, made, atol=1e-6)


class TestCodebook:
    def test_it_begins_where_the_latents_are(self):
        centres = 10 * jax.random.normal(jax.random.key(1), (6, 4))
        noise = 0.1 * jax.random.normal(jax.random.key(2), (6, 5, 4, 4))
        latents = centres[:, None, None] + noise
        codes = np.asarray(initial_codebook(latents, 16, KEY))
        distances = ((np.asarray(latents)[..., None, :] - codes) ** 2).sum(-1)
        nearest = distances.argmin(-1)
        for code in np.unique(nearest):  # Lloyd's algorithm has come to rest
            mean = np.asarray(latents)[nearest == code].mean(axis=0)
            np.testing.assert_allclose(codes[code], mean, atol=1e-4)
        assert distances.min(-1).mean() < 0.03  # four coordinates of variance 0.01 each, or less
        np.testing.assert_array_equal(codes, initial_codebook(latents, 16, KEY))

    def test_more_codes_than_latents_can_begin(self):
        codes = initial_codebook(jnp.ones((1, 1, 2, 4)), 8, KEY)
        np.testing.assert_array_equal(codes, jnp.ones((8, 4)))

    def test_codes_idle_for_long_start_anew_and_used_ones_do_not(self):
        latents = jnp.arange(16.0).reshape(2, 2, 2, 2)
        token_ids = jnp.array([[[0, 1], [1, 0]], [[4, 4], [0, 1]]], jnp.int32)
        idle = jnp.array([9, 0, 1, 2, 3, 4], jnp.int32)
        idle, dead, fresh = restart_codes(idle, token_ids, latents, KEY, after=3)
        np.testing.assert_array_equal(dead, [False, False, False, True, False, True])
        np.testing.assert_array_equal(idle, [0, 0, 2, 0, 0, 0])
        outputs = {tuple(row) for row in np.asarray(latents).reshape(-1, 2)}
        rows = [tuple(row) for row in np.asarray(fresh)]
        assert set(rows) <= outputs
        assert len(set(rows)) == len(rows)  # no two codes start at one place

    def test_where_they_start_depends_on_the_key_alone(self):
        arguments = (jnp.zeros(6, jnp.int32), jnp.zeros((2, 2, 2), jnp.int32),
                     jax.random.normal(KEY, (2, 2, 2, 3)))  # fmt: skip
        first, again, other = (restart_codes(*arguments, jax.random.key(seed), after=1)[2]
                               for seed in (0, 0, 1))  # fmt: skip
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)

    def test_none_starts_anew_where_that_is_turned_off(self):
        idle = jnp.full(4, 1000, jnp.int32)
        ids, latents = jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1, 2))
        idle, dead, _ = restart_codes(idle, ids, latents, KEY, after=0)
        assert not dead.any()
        np.testing.assert_array_equal(idle, [0, 1001, 1001, 1001])

    def test_perplexity_counts_codes_used_equally(self):
        assert float(perplexity(jnp.arange(8).reshape(2, 2, 2), 16)) == pytest.approx(8, rel=1e-5)
        assert float(perplexity(jnp.zeros((1, 2, 2), jnp.int32), 16)) == 1


def stepper(split, *, judge=None, **options):
    """A compiled step, and the state before the first."""
    graphdef, params = split
    optimizer = optax.adam(1e-2)
    discriminator = judge and Discriminator(judge, rngs=nnx.Rngs(1))
    judge_def, judge_params = nnx.split(discriminator, nnx.Param) if judge else (None, None)
    state = TokenizerState(
        step=jnp.int32(0),
        params=params,
        ema=params,
        opt_state=optimizer.init(params),
        idle=jnp.zeros(CFG.codebook_size, jnp.int32),
        discriminator=judge_params,
        discriminator_opt_state=judge and optimizer.init(judge_params),
    )
    settings = {"cfg": LossConfig(), "ema_decay": 0.5, **options}
    step = functools.partial(
        tokenizer_step,
        networks=Networks(graphdef, judge_def),
        optimizer=optimizer,
        discriminator_optimizer=optimizer,
        **settings,
    )
    return jax.jit(step), state


@pytest.fixture(scope="module")
def plain(split):
    """The step as it is by default, compiled once."""
    return stepper(split)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


class TestStep:
    def test_a_step_moves_everything_and_says_what_it_saw(self, split, plain):
        step, before = plain
        after, metrics = step(before, photographs(), KEY, None)
        assert int(after.step) == 1
        _, outcome = vqgan_loss(nnx.merge(*split), photographs() / 255, LossConfig())
        for name, value in outcome.terms.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4)
        assert float(metrics["grad_norm"]) > 0
        assert not same(after.params["decoder"], before.params["decoder"])
        middle = jax.tree.map(lambda a, b: (a + b) / 2, before.params, after.params)
        for ours, theirs in zip(leaves(after.ema), leaves(middle), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)

    def test_a_dead_code_moves_to_a_latent_in_the_moving_average_too(self, split):
        step, state = stepper(split, cfg=LossConfig(restart_after=5))
        _, outcome = vqgan_loss(nnx.merge(*split), photographs() / 255, LossConfig())
        unused = np.setdiff1d(np.arange(8), np.asarray(outcome.token_ids))
        assert len(unused)
        state = state._replace(idle=jnp.full(8, 4, jnp.int32))
        after, metrics = step(state, photographs(), KEY, None)
        assert float(metrics["restarted_codes"]) == len(unused)
        np.testing.assert_array_equal(after.idle, 0)
        latents = np.asarray(outcome.latents).reshape(-1, 4)
        codebook, ema = (np.asarray(tree["codebook"][...]) for tree in (after.params, after.ema))
        for code in range(8):
            gap = np.abs(latents - codebook[code]).max(axis=-1).min()
            assert (gap < 1e-5) == (code in unused)
            assert np.array_equal(ema[code], codebook[code]) == (code in unused)

    def test_without_the_codebook_it_stays_as_it_is(self, split):
        step, before = stepper(split, quantised=False)
        after, metrics = step(before, photographs(), KEY, None)
        assert same(after.params["codebook"], before.params["codebook"])
        np.testing.assert_array_equal(after.idle, before.idle)
        assert "perplexity" not in metrics

    def test_the_codebook_begins_in_the_moving_average_too(self, split):
        _, state = stepper(split)
        begun = codebook_from_images(state, photographs(), KEY, graphdef=split[0])
        latents = nnx.merge(*split).encoder(photographs() / 255)
        assert same(begun.params["codebook"], begun.ema["codebook"])
        assert same(begun.params["encoder"], state.params["encoder"])

        def distance(codebook):
            return float(jnp.min(jnp.sum((latents[..., None, :] - codebook) ** 2, -1), -1).mean())

        assert distance(begun.params["codebook"][...]) < distance(state.params["codebook"][...]) / 2


class TestDiscriminator:
    JUDGE = DiscriminatorConfig(channels=4, levels=1)

    def test_its_opinion_teaches_the_network_and_the_images_teach_it(self, split, plain):
        cfg = LossConfig(adversarial=1.0)
        step, before = stepper(split, judge=self.JUDGE, cfg=cfg)
        judged, metrics = step(before, photographs(), KEY, None)
        step, state = plain
        alone, _ = step(state, photographs(), KEY, None)
        assert not same(judged.params["decoder"], alone.params["decoder"])
        assert not same(judged.discriminator, before.discriminator)
        assert float(metrics["discriminator"]) > 0

    def test_it_learns_to_tell_reconstructions_from_images(self, split):
        # the network stands still: its losses have no weight
        still = LossConfig(0.0, 0.0, 0, 0.0, 0.0, 0, adversarial=0.0)
        step, state = stepper(split, judge=self.JUDGE, cfg=still)
        told = []
        for _ in range(40):
            state, metrics = step(state, photographs(), KEY, None)
            told.append(float(metrics["discriminator"]))
        assert told[0] > 0.8
        assert told[-1] < 0.5

    def test_it_leaves_no_trace_where_it_takes_no_part(self, split, plain):
        _, before = stepper(split, judge=self.JUDGE)
        step, state = plain
        after, metrics = step(before, photographs(), KEY, None)
        alone, _ = step(state, photographs(), KEY, None)
        assert same(after.discriminator, before.discriminator)
        assert same(after.discriminator_opt_state, before.discriminator_opt_state)
        assert same(after.params, alone.params)
        assert "discriminator" not in metrics
