import dataclasses
import json
import pathlib

import pytest

from enat_jax.config import (
    Config,
    check,
    config_from_dict,
    load_config,
    override_config,
)
from enat_jax.config_file import ConfigError
from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.enat.network import ENATConfig
from enat_jax.training.tokenizer_config import load_tokenizer_config

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
TOKENIZERS = sorted(FOLDER.glob("*_tokenizer.py"))  # configs of a VQGAN's training
STUDIES = [*FOLDER.glob("ablate_*.py"), *FOLDER.glob("search_*.py")]  # of what is trained already
CONFIGS = sorted(set(FOLDER.glob("*.py")) - set(TOKENIZERS) - set(STUDIES))
DIGITS = "configs/digits.py"


def refusal(*overrides, fields=None):
    """The one line with which overrides of the default config are refused."""
    with pytest.raises(ConfigError) as caught:
        override_config(fields or {}, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path):
    def write(body):
        path = tmp_path / "experiment.py"
        path.write_text(f"from ml_collections import ConfigDict\n{body}")
        return str(path)

    return write


class TestShippedConfigs:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_a_shipped_config_is_right_as_it_stands(self, path):
        config = load_config(str(path))
        assert check(config) == []

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_a_shipped_config_says_how_it_is_run(self, path):
        assert f"enat train --config=configs/{path.name}" in path.read_text()

    def test_there_is_something_to_test(self):
        names = {path.stem for path in CONFIGS}
        assert {"digits", "enat_s_256", "enat_b_256", "enat_l_256", "photos", "my_images"} <= names

    @pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.stem)
    def test_a_tokenizers_config_fits_that_of_the_network_that_uses_its_tokens(self, path):
        assert f"enat train_tokenizer --config=configs/{path.name}" in path.read_text()
        tokenizer = load_tokenizer_config(str(path))
        user = load_config(str(path).replace("_tokenizer.py", ".py"))
        assert user.tokenizer.grid[0] * tokenizer.model.patch == tokenizer.train.image_size
        assert user.model.codebook_size in (0, tokenizer.model.codebook_size)
        assert (user.images.folder, user.images.name) == (
            tokenizer.images.folder,
            tokenizer.images.name,
        )

    @pytest.mark.parametrize("name", ["enat_s_256", "enat_b_256", "enat_l_256", "enat_l_512"])
    def test_a_config_of_the_paper_names_the_whole_way_from_images_to_a_score(self, name):
        text = (FOLDER / f"{name}.py").read_text()
        for verb in ("convert --kind=vqgan", "tokenize", "train", "evaluate"):
            assert f"enat {verb} " in text
        config = load_config(f"configs/{name}.py")
        assert config.tokenizer.name == "vqgan"
        assert config.images.name == "imagenet2012"
        assert config.evaluate.num_images == 50_000

    @pytest.mark.parametrize(
        ("name", "sizes", "learning_rate", "batch_size", "guidance", "sampling_temperature"),
        [
            ("enat_l_256", (256, 1024, 16, 22, 2), 4e-4, 2048, 2.5, 6.0),
            ("enat_l_512", (1024, 1024, 16, 22, 2), 1e-4, 512, 3.5, 4.0),
        ],
    )
    def test_enat_l_is_the_papers(
        self, name, sizes, learning_rate, batch_size, guidance, sampling_temperature
    ):
        config = load_config(f"configs/{name}.py")
        model = config.model
        found = (model.length, model.width, model.num_heads, model.encoder_depth,
                 model.decoder_depth)  # fmt: skip
        assert found == sizes
        assert config.optim.learning_rate == learning_rate
        assert config.train.batch_size == batch_size
        assert config.train.mask_beta == (12, 3)
        assert config.strategy.rule == "enat"
        assert config.strategy.guidance_scale == guidance
        assert config.strategy.sampling_temperature == sampling_temperature
        assert config.strategy.choice_temperature == 1.5


class TestErrors:
    def test_all_that_is_wrong_is_said_at_once_with_value_limit_and_field(self):
        message = refusal(
            "model.width=65", "model.num_heads=4", "train.programs=5", "optim.ema_decay=1.0",
            "strategy.steps=257", "train.batch_size=100", "tokenizer.grid=(8, 8)",
        )  # fmt: skip
        for part in (
            "model.width = 65 must be a multiple of model.num_heads = 4",
            "train.programs = 5 must be between 1 and 4",
            "optim.ema_decay = 1.0 must be in [0, 1)",
            "strategy.steps = 257 must be between 1 and model.length = 256",
            "train.batch_size = 100 must be a multiple of train.images_per_row"
            " x train.accumulation = 8",
            "model.length = 256 must be the product of tokenizer.grid = (8, 8)",
        ):
            assert part in message

    @pytest.mark.parametrize(
        "text",
        [
            "model.num_heads=0", "model.num_heads=-4", "model.width=0", "model.num_classes=-1",
            "model.encoder_depth=0", "model.decoder_depth=-1", "model.mlp_ratio=0",
            "model.codebook_size=1", "model.codebook_size=65536", "model.dropout=1.0",
            "model.dropout=-0.1", "tokenizer.grid=(0, 16)", "tokenizer.grid=(-16, -16)",
            "data.read_threads=0",
            "optim.learning_rate=-1.0", "optim.warmup_steps=-1",
            "optim.weight_decay=-0.1", "optim.betas=(1.0, 0.9)", "optim.betas=(0.9, -0.1)",
            "optim.epsilon=-1.0", "optim.max_grad_norm=-1.0", "optim.ema_decay=-0.5",
            "train.seed=-1", "train.seed=4294967296", "train.steps=0",
            "train.batch_size=0", "train.batch_size=-8",
            "train.accumulation=0", "train.images_per_row=0", "train.images_per_row=-8",
            "train.programs=0", "train.programs=5", "train.mask_beta=(0.0, 3.0)",
            "train.reuse_probability=1.5", "train.class_dropout=1.0", "train.label_smoothing=-0.1",
            "train.log_every=0", "train.sample_every=-1", "train.checkpoint_every=0",
            "train.keep=0", "strategy.steps=0", "strategy.sampling_temperature=0.0",
            "strategy.choice_temperature=-1.0", "strategy.guidance_scale=-1.0",
            "sample.batch_size=0", "sample.decode_batch_size=-1", "sample.buckets=-1",
            "sample.max_padding=-0.1", "images.shard_size=0", "images.max_unreadable=1.0",
            "evaluate.batch_size=0", "evaluate.save_every=0", "evaluate.num_images=1",
        ],
    )  # fmt: skip
    def test_a_value_out_of_range_is_named(self, text):
        field = text.partition("=")[0]
        assert f"{field}" in refusal(text)
        assert " must " in refusal(text)

    def test_a_warm_up_longer_than_a_decaying_run_is_refused(self):
        assert "optim.warmup_steps = 5000 must be below train.steps = 100" in refusal(
            "optim.decay='cosine'", "train.steps=100"
        )
        override_config({}, ["train.steps=100"])  # a constant rate may end while it warms up

    def test_greys_that_bytes_cannot_tell_apart_are_refused(self):
        assert "model.codebook_size = 1024" in refusal("tokenizer.name='pixels'")

    def test_a_strategy_that_leaves_a_step_nothing_to_predict_is_refused(self):
        message = refusal("strategy.schedule='sqrt'", "strategy.steps=200")
        assert "strategy" in message
        assert "of 200" in message

    def test_an_unknown_field_comes_with_a_guess(self):
        message = refusal("model.widht=32", "trian.steps=3", "optim.zzz=1")
        assert "model.widht = 32 is no field of model (did you mean width?)" in message
        assert "trian = {'steps': 3} is no field of the config (did you mean train?)" in message
        assert "optim.zzz = 1 is no field of optim;" in message + ";"

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("model.width=32.0", "int"),
            ("model.width=true", "int"),
            ("model.width=True", "int"),
            ("optim.learning_rate=fast", "float"),
            ("optim.learning_rate=False", "float"),
            ("data.cache=1", "bool"),
            ("data.name=3", "str"),
            ("tokenizer.grid=16", "tuple[int, int]"),
            ("tokenizer.grid=(16, 16, 1)", "tuple[int, int]"),
        ],
    )
    def test_a_wrong_type_is_named(self, text, kind):
        field = text.partition("=")[0]
        message = refusal(text)
        assert f"{field} = " in message
        assert f"must be of type {kind}" in message

    def test_a_wrong_type_inside_a_tuple_is_named(self):
        assert "tokenizer.grid = 'x' must be of type int" in refusal("tokenizer.grid=(16, 'x')")

    def test_a_wrong_choice_comes_with_the_right_ones(self):
        message = refusal("model.dtype=float16")
        assert "model.dtype = 'float16' must be one of 'float32', 'bfloat16'" in message

    @pytest.mark.parametrize("text", ["model=3", "model=[1]"])
    def test_a_section_must_be_a_section(self, text):
        assert "must be a section of fields" in refusal(text)

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("model.width", "is not of the form section.field=value"),
            ("=3", "is no field"),
            ("model.width.x=3", "width is no section"),
        ],
    )
    def test_an_override_that_is_none_is_refused(self, text, part):
        assert part in refusal(text, fields={"model": {"width": 64, "num_heads": 4}})


class TestNetworks:
    """The section `model` is of one network or another, as its field `name` says."""

    def test_enat_unless_another_is_named(self):
        assert isinstance(override_config({}, []).model, ENATConfig)

    def test_the_one_named_has_its_own_fields(self):
        fields = {"model": {"depth": 6}, "train": {"reuse_probability": 0.0}}
        model = override_config(fields, ["model.name=autonat"]).model
        assert model == AutoNATConfig(depth=6)
        assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(
            override_config(fields, ["model.name=autonat"])
        )))).model == model  # fmt: skip

    def test_fields_of_the_other_are_refused(self):
        assert "model.encoder_depth = 3 is no field of model" in refusal(
            "model.encoder_depth=3", "model.name=autonat"
        )

    def test_an_unknown_one_comes_with_those_there_are(self):
        assert refusal("model.name=maskgit") == (
            "config: model.name = 'maskgit' must be one of 'enat', 'autonat'"
        )

    def test_one_that_carries_no_features_cannot_be_trained_to_reuse_them(self):
        line = refusal("model.name=autonat", "train.reuse_probability=0.5")
        assert "train.reuse_probability = 0.5 must be 0" in line


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "section", "field", "value"),
        [
            ("model.width=96", "model", "width", 96),
            ("optim.learning_rate=1", "optim", "learning_rate", 1.0),
            ("optim.learning_rate=1e-3", "optim", "learning_rate", 1e-3),
            ("optim.betas=(0.9, 1e-2)", "optim", "betas", (0.9, 0.01)),
            ("optim.betas=[0, 0.5]", "optim", "betas", (0.0, 0.5)),
            ("data.name=imagenet_tokens", "data", "name", "imagenet_tokens"),
            ("data.name='imagenet'", "data", "name", "imagenet"),
            ("data.data_dir=gs://bucket/a=b", "data", "data_dir", "gs://bucket/a=b"),
            ("data.split=train[:90%]", "data", "split", "train[:90%]"),
            ("data.cache=False", "data", "cache", False),
            ("model.dtype=bfloat16", "model", "dtype", "bfloat16"),
            ("mesh.fsdp=-1", "mesh", "fsdp", -1),
        ],
    )
    def test_an_override_is_read_as_its_field_says(self, text, section, field, value):
        found = getattr(getattr(override_config({}, [text]), section), field)
        assert found == value
        assert type(found) is type(value)

    def test_the_last_override_counts(self):
        assert override_config({}, ["train.seed=1", "train.seed=2"]).train.seed == 2

    def test_the_mapping_given_stays_as_it_is(self):
        fields = {"train": {"seed": 1}}
        override_config(fields, ["train.seed=2"])
        assert fields == {"train": {"seed": 1}}

    def test_overrides_reach_a_config_file(self):
        config = load_config(DIGITS, ["train.steps=500", "model.width=32"])
        assert (config.train.steps, config.model.width) == (500, 32)
        assert config.model.encoder_depth == 3


class TestFile:
    def test_what_a_file_leaves_out_keeps_its_default(self, config_file):
        path = config_file("def get_config(): return ConfigDict({'train': {'seed': 7}})")
        assert load_config(path) == dataclasses.replace(
            Config(), train=dataclasses.replace(Config().train, seed=7)
        )

    def test_an_argument_after_a_colon_goes_to_the_file(self, config_file):
        path = config_file(
            "def get_config(depth): return ConfigDict({'model': {'encoder_depth': int(depth)}})"
        )
        assert load_config(f"{path}:3").model.encoder_depth == 3

    def test_a_missing_file_is_named(self):
        with pytest.raises(ConfigError, match=r"no config file 'configs/digit\.py'"):
            load_config("configs/digit.py")

    @pytest.mark.parametrize(
        ("body", "part"),
        [
            ("def get_config(: pass", "SyntaxError"),
            ("import no_such_module", "ModuleNotFoundError"),
            ("x = 1", "AttributeError"),
            ("def get_config(): return {'model': {}}", "gave no ConfigDict"),
            ("def get_config(): return ConfigDict({'model': {'width': 3, 'depth': 2}})", "depth"),
        ],
    )
    def test_a_file_that_is_no_config_is_refused_in_a_line(self, config_file, body, part):
        with pytest.raises(ConfigError) as caught:
            load_config(config_file(body))
        assert part in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_survives_json(path):
    config = load_config(str(path))
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(stored) == config


def test_every_field_is_documented():
    for section in dataclasses.fields(Config):
        kind = section.default_factory
        said = "".join(each.__doc__ or "" for each in kind.__mro__)  # its base's fields as well
        for field in dataclasses.fields(kind):
            assert f"{field.name}:" in said, f"{kind.__name__}.{field.name}"
