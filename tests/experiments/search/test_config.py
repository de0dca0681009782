import pytest

from enat_jax.config_file import ConfigError
from enat_jax.experiments.search.config import SearchConfig, check, load_search_config


def test_the_default_is_the_published_search():
    cfg = SearchConfig()
    assert check(cfg) == []
    assert (cfg.num_images, cfg.updates, cfg.classes) == ((50_000,), (100,), "random")
    assert (cfg.optimiser, cfg.start, cfg.objective.name) == ("sgd", "published", "fid")
    sgd = cfg.sgd
    assert (sgd.ratio_probe, sgd.probe, sgd.momentum) == (1e-2, 0.1, 0.5)
    assert (sgd.ratio_learning_rate, sgd.learning_rate) == (1e-3, 0.1)


def test_the_digits_search_is_read_and_overridden():
    cfg = load_search_config("configs/search_digits.py", ["seed=5", "cma.population=6"])
    assert (cfg.steps, cfg.seed, cfg.cma.population) == (4, 5, 6)
    assert cfg.objective.name == "digits"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps = 0 must be at least 1"),
        ("num_images=(1, 50)", r"num_images\[0\] = 1 must be at least 2"),
        ("updates=(3,)", "must be of one length: an entry per phase"),
        ("optimiser=adam", "optimiser = 'adam' must be one of 'sgd', 'cma'"),
        ("margin=0.5", "margin = 0.5 must be at least 1"),
        ("sgd.probe=0.0", r"sgd\.probe = 0.0 must be above 0 and finite"),
        ("sgd.momentum=1.0", r"sgd\.momentum = 1.0 must be in \[0, 1\)"),
        ("cma.population=1", r"cma\.population = 1 must be 0 or at least 2"),
        ("training.factor=1.0", r"training\.factor = 1.0 must be above 1"),
        ("step=3", r"step = 3 is no field of the config \(did you mean steps\?\)"),
        ("objective.nam=fid", r"objective\.nam = 'fid' is no field of objective"),
    ],
)
def test_what_cannot_be_is_named(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_search_config("configs/search_digits.py", [override])
    assert "\n" not in str(caught.value)
