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
    find_idle,
    initial_codebook,
    perplexity,
    some_latents,
    tokenizer_step,
    vqgan_loss,
)

CFG = VQGANConfig(channels=4, channel_multipliers=(1,), num_res_blocks=1, latent_channels=4,
                  codebook_size=8, norm_groups=1)  # fmt: skip
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
PIXELS = jnp.asarray(IMAGES) / jnp.float32(255)


@pytest.fixture(scope="module")
def split():
    return nnx.split(VQGAN(CFG, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.fixture(scope="module")
def coded(split):
    """What the network makes of the images: latents, distances to the codes, and decoded."""

    def code(params):
        model = nnx.merge(split[0], params)
        latents, codebook = model.encoder(PIXELS), model.codebook[...]
        distances = jnp.sum((latents[..., None, :] - codebook) ** 2, axis=-1)
        codes = codebook[jnp.argmin(distances, axis=-1)]
        return latents, codes, distances, model.decoder(codes), model.decoder(latents)

    return [np.asarray(array) for array in jax.jit(code)(split[1])]


def loss_of(split, cfg, **options):
    return jax.jit(lambda params: vqgan_loss(nnx.merge(split[0], params), PIXELS, cfg, **options))


class TestLosses:
    def test_each_term_is_its_formula(self, split, coded):
        latents, codes, distances, made, _ = coded
        cfg = LossConfig(l1=2.0, l2=3.0, codebook=5.0, commitment=7.0, lpips=11.0, adversarial=13.0)
        loss, outcome = loss_of(
            split,
            cfg,
            lpips=lambda a, b: jnp.max(jnp.abs(a - b), axis=(1, 2, 3)),
            discriminator=lambda x: x[..., 0],
        )(split[1])
        error = np.asarray(made - PIXELS)
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

    def test_each_term_teaches_its_own_part(self, split):
        def terms(params):
            _, outcome = vqgan_loss(nnx.merge(split[0], params), PIXELS, LossConfig())
            return jnp.stack([outcome.terms[name] for name in ("l1", "codebook", "commitment")])

        grads = jax.jit(jax.jacrev(terms))(split[1])
        taught = {
            part: [any(np.any(leaf[term]) for leaf in leaves(grads[part])) for term in range(3)]
            for part in ("encoder", "codebook", "decoder")
        }
        assert taught == {
            "encoder": [True, False, True],
            "codebook": [False, True, False],
            "decoder": [True, False, False],
        }


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

    def test_more_codes_than_latents_can_begin(self):
        codes = initial_codebook(jnp.ones((1, 1, 2, 4)), 8, KEY)
        np.testing.assert_array_equal(codes, jnp.ones((8, 4)))

    @pytest.mark.parametrize(
        ("after", "dead", "idle"),
        [(3, [3, 5], [0, 0, 2, 0, 0, 0]), (0, [], [0, 0, 2, 3, 0, 5])],  # 0: none ever
    )
    def test_codes_idle_for_long_start_anew_and_used_ones_do_not(self, after, dead, idle):
        token_ids = jnp.array([[[0, 1], [1, 0]], [[4, 4], [0, 1]]], jnp.int32)
        before = jnp.array([9, 0, 1, 2, 3, 4], jnp.int32)
        steps, anew = find_idle(before, token_ids, after=after)
        np.testing.assert_array_equal(np.flatnonzero(anew), dead)
        np.testing.assert_array_equal(steps, idle)

    def test_they_start_from_different_latents_that_depend_on_the_key(self):
        latents = jnp.arange(16.0).reshape(2, 2, 2, 2)
        first, again, other = (
            np.asarray(some_latents(latents, 6, jax.random.key(seed))) for seed in (0, 0, 1)
        )
        rows = {tuple(row) for row in first}
        assert len(rows) == 6
        assert rows <= {tuple(row) for row in np.asarray(latents).reshape(-1, 2)}
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)

    def test_perplexity_counts_codes_used_equally(self):
        assert float(perplexity(jnp.arange(8).reshape(2, 2, 2), 16)) == pytest.approx(8, rel=1e-5)
        assert float(perplexity(jnp.zeros((1, 2, 2), jnp.int32), 16)) == 1


def stepper(split, optimizer, cfg):
    """A compiled step, and the state before the first."""
    graphdef, params = split
    judge, judge_params = nnx.split(
        Discriminator(DiscriminatorConfig(channels=4, levels=1), rngs=nnx.Rngs(1)), nnx.Param
    )
    adam = optax.adam(1e-2)
    state = TokenizerState(
        step=jnp.int32(0),
        params=params,
        ema=params,
        opt_state=optimizer.init(params),
        codes={"idle": jnp.full(CFG.codebook_size, 4, jnp.int32)},
        discriminator=judge_params,
        discriminator_opt_state=adam.init(judge_params),
    )
    step = functools.partial(
        tokenizer_step,
        networks=Networks(graphdef, judge),
        optimizer=optimizer,
        discriminator_optimizer=adam,
        cfg=cfg,
        ema_decay=0.5,
    )
    return jax.jit(step, static_argnums=(4, 5)), state


@pytest.fixture(scope="module")
def plain(split):
    return stepper(split, optax.adam(1e-2), LossConfig(restart_after=5))


@pytest.fixture(scope="module")
def taken(plain):
    """A step with its codebook, after four in which no code was used."""
    return plain[1], *plain[0](plain[1], IMAGES, KEY, None)


@pytest.fixture(scope="module")
def adversarial(split):
    """A step with a discriminator, of a network that stands still."""
    return stepper(split, optax.sgd(0.0), LossConfig(adversarial=1.0))


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


class TestStep:
    def test_a_step_moves_everything_and_tells_what_it_saw(self, taken, split):
        before, after, metrics = taken
        assert int(after.step) == 1
        _, outcome = loss_of(split, LossConfig())(split[1])
        for name, value in outcome.terms.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4)
        assert float(metrics["grad_norm"]) > 0
        assert not same(after.params["decoder"], before.params["decoder"])
        assert same(after.discriminator, before.discriminator)  # which takes no part
        assert same(after.discriminator_opt_state, before.discriminator_opt_state)
        assert "discriminator" not in metrics
        for part in ("encoder", "decoder"):
            middle = jax.tree.map(lambda a, b: (a + b) / 2, before.params[part], after.params[part])
            for ours, theirs in zip(leaves(after.ema[part]), leaves(middle), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-6)

    def test_a_dead_code_moves_to_a_latent_in_the_ema_too(self, taken, coded):
        _, after, metrics = taken
        latents, _, distances, *_ = coded
        unused = np.setdiff1d(np.arange(8), distances.argmin(-1))
        assert len(unused)
        assert float(metrics["restarted_codes"]) == len(unused)
        np.testing.assert_array_equal(after.codes["idle"], 0)
        codebook, ema = (np.asarray(tree["codebook"][...]) for tree in (after.params, after.ema))
        for code in range(8):
            gap = np.abs(latents.reshape(-1, 4) - codebook[code]).max(axis=-1).min()
            assert (gap < 1e-5) == (code in unused)
            assert np.array_equal(ema[code], codebook[code]) == (code in unused)

    def test_without_the_codebook_it_stays_and_the_decoder_sees_the_latents(self, plain, coded):
        step, before = plain
        after, metrics = step(before, IMAGES, KEY, None, False)
        assert same(after.params["codebook"], before.params["codebook"])
        np.testing.assert_array_equal(after.codes["idle"], before.codes["idle"])
        assert not metrics.keys() & {"perplexity", "codebook", "commitment"}
        assert float(metrics["l2"]) == pytest.approx(float(jnp.mean((coded[-1] - PIXELS) ** 2)))

    def test_the_codebook_begins_in_the_ema_too(self, split, plain, coded):
        begun = jax.jit(functools.partial(codebook_from_images, graphdef=split[0]))(
            plain[1], IMAGES, KEY
        )
        assert same(begun.params["codebook"], begun.ema["codebook"])
        assert same(begun.params["encoder"], plain[1].params["encoder"])
        latents, _, distances, *_ = coded
        codebook = np.asarray(begun.params["codebook"][...])
        moved = ((latents[..., None, :] - codebook) ** 2).sum(-1)
        assert moved.min(-1).mean() < distances.min(-1).mean() / 2

    def test_the_discriminators_opinion_teaches_and_the_images_teach_it(self, adversarial, taken):
        step, state = adversarial
        state, metrics = step(state, IMAGES, KEY, None, True, True)
        opinion = float(metrics["adversarial"])
        assert float(metrics["loss"]) == pytest.approx(float(taken[2]["loss"]) + opinion, rel=1e-4)
        assert float(metrics["grad_norm"]) != pytest.approx(float(taken[2]["grad_norm"]), rel=1e-3)
        assert float(metrics["discriminator"]) > 0.8
        for _ in range(40):
            state, metrics = step(state, IMAGES, KEY, None, True, True)
        assert float(metrics["discriminator"]) < 0.5
