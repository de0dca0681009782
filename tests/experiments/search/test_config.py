import pytest

from enat_jax.config_file import read_config
from enat_jax.errors import UserError
from enat_jax.experiments.search.config import SearchConfig


def test_the_default_is_the_published_search():
    cfg = SearchConfig()
    assert (cfg.num_images, cfg.updates, cfg.classes) == ((50_000,), (100,), "random")
    assert (cfg.optimiser, cfg.start, cfg.objective.name) == ("sgd", "published", "fid")
    sgd = cfg.sgd
    assert (sgd.ratio_probe, sgd.probe, sgd.momentum) == (1e-2, 0.1, 0.5)
    assert (sgd.ratio_learning_rate, sgd.learning_rate) == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("steps=0", "steps = 0 must be at least 1"),
        ("num_images=(1, 50)", "num_images[0] = 1 must be between 2 and 100000000"),
        ("updates=(3,)", "num_images = (200, 400) and updates = (3,) must be of one length: an"
         " entry per phase"),
        ("optimiser=adam", "optimiser = 'adam' must be one of 'sgd', 'cma'"),
        ("margin=0.5", "margin = 0.5 must be at least 1"),
        ("sgd.probe=0.0", "sgd.probe = 0.0 must be above 0"),
        ("sgd.probe=1e999", "sgd.probe = inf must be finite"),
        ("sgd.momentum=1.0", "sgd.momentum = 1.0 must be in [0, 1)"),
        ("cma.population=1", "cma.population = 1 must be 0 or at least 2"),
        ("training.factor=1.0", "training.factor = 1.0 must be above 1"),
        ("objective.batch_size=0", "objective.batch_size = 0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(override, problem):
    with pytest.raises(UserError) as caught:
        read_config(SearchConfig, "configs/search_digits.py", [override])
    assert str(caught.value) == f"config: {problem}"
