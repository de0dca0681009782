import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from enat_jax.config import (
    Config,
    PatchesRunConfig,
    TokenizerRunConfig,
    config_from_dict,
    load_config,
    load_tokenizer_config,
)
from enat_jax.config_file import make_config, read_config, read_fields
from enat_jax.errors import UserError
from enat_jax.experiments.ablate.config import AblateConfig
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.models.autonat.config import AutoNATConfig

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
KINDS = {  # by how a file's name begins or ends
    "ablate": (AblateConfig, "ablate"),
    "search": (SearchConfig, "search"),
    "tokenizer": (TokenizerRunConfig, "train_tokenizer"),
}
PATHS = sorted(FOLDER.rglob("*.py"))
PHOTOS = read_fields("configs/photos_tokenizer.py")


def refusals(*overrides, kind=Config, fields=()):
    """The problems for which a config is refused, in a line."""
    with pytest.raises(UserError, match=r"^config: ") as caught:
        make_config(kind, dict(fields), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("config: ").split("; ")


def test_a_config_is_checked_without_jax():
    code = "import enat_jax.config, enat_jax.experiments.ablate.config, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "scipy", "grain", "tensorflow_datasets", "sklearn"}
    assert not heavy & set(done.stdout.split())


def test_every_field_of_a_section_is_documented():
    kinds = (Config, TokenizerRunConfig, PatchesRunConfig, SearchConfig, AblateConfig)
    fields = [each for kind in kinds for each in dataclasses.fields(kind)]
    sections = {each.default_factory for each in fields} | {SearchConfig, AblateConfig}
    for section in filter(dataclasses.is_dataclass, sections):
        documented = "".join(each.__doc__ or "" for each in section.__mro__)
        for field in dataclasses.fields(section):
            assert f"{field.name}:" in documented, f"{section.__name__}.{field.name}"


class TestShippedConfigs:
    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_one_is_right_as_it_stands_says_how_it_is_run_and_survives_json(self, path):
        words = path.stem.split("_")
        kind, verb = KINDS.get(words[0], KINDS.get(words[-1], (Config, "train")))
        if kind is TokenizerRunConfig:
            kind = type(load_tokenizer_config(str(path)))
        config = read_config(kind, str(path))
        assert f"enat {verb} --config=configs/{path.relative_to(FOLDER)}" in path.read_text()
        stored = json.dumps(dataclasses.asdict(config))
        again = make_config(kind, json.loads(stored))
        assert json.dumps(dataclasses.asdict(again)) == stored
        assert kind is AblateConfig or again == config  # whose grid's tuples are lists in JSON

    @pytest.mark.parametrize("name", ["photos", "my_images", "emoji"])
    def test_a_tokenizers_config_fits_that_of_the_network_that_uses_its_tokens(self, name):
        tokenizer = load_tokenizer_config(f"configs/{name}_tokenizer.py")
        user = load_config(f"configs/{name}.py")
        assert user.tokenizer.grid[0] * tokenizer.model.patch == tokenizer.train.image_size
        assert user.model.codebook_size in (0, tokenizer.model.codebook_size)
        assert user.images.folder == tokenizer.images.folder
        assert user.images.name == tokenizer.images.name

    @pytest.mark.parametrize(
        ("name", "numbers"),
        [
            ("enat_s_256", (256, 366, 6, 15, 1, 4e-4, 2048, 2.5, 6.0)),
            ("enat_b_256", (256, 768, 8, 15, 1, 4e-4, 2048, 2.5, 6.0)),
            ("enat_l_256", (256, 1024, 16, 22, 2, 4e-4, 2048, 2.5, 6.0)),
            ("enat_l_512", (1024, 1024, 16, 22, 2, 1e-4, 512, 3.5, 4.0)),
        ],
    )
    def test_a_config_of_the_paper_is_its_and_names_all_verbs_to_a_score(self, name, numbers):
        config = load_config(f"configs/{name}.py")
        model, strategy = config.model, config.strategy
        assert numbers == (model.length, model.width, model.num_heads, model.encoder_depth,
                           model.decoder_depth, config.optim.learning_rate, config.train.batch_size,
                           strategy.guidance_scale, strategy.sampling_temperature)  # fmt: skip
        assert (config.train.mask_beta, strategy.choice_temperature) == ((12, 3), 1.5)
        assert (config.images.name, config.tokenizer.name) == ("imagenet2012", "vqgan")
        assert config.evaluate.num_images == 50_000
        text = (FOLDER / f"{name}.py").read_text()
        for verb in ("convert --kind=vqgan", "tokenize", "train", "evaluate"):
            assert f"enat {verb} " in text


class TestLimits:
    @pytest.mark.parametrize(
        ("value", "must", "names"),
        [
            (-1, "be at least 0",
             "model.num_classes sample.decode_batch_size sample.buckets"
             " sample.max_padding optim.learning_rate optim.warmup_steps optim.weight_decay"
             " optim.epsilon optim.max_grad_norm train.sample_every strategy.guidance_scale"
             " strategy.choice_temperature data.prefetch_batches"),
            (-1, "be between 0 and 1024", "model.decoder_depth"),
            (0, "be at least 1",
             "model.width model.num_heads train.steps"
             " train.batch_size train.accumulation train.images_per_row train.log_every"
             " train.checkpoint_every train.keep train.max_bad_steps sample.batch_size"
             " images.shard_size evaluate.batch_size evaluate.save_every"),
            (1, "be at least 2", "model.length"),
            (10**9, "be between 2 and 100000000", "evaluate.num_images"),
            (1.0, "be in [0, 1)", "model.dropout optim.ema_decay train.class_dropout"
             " train.label_smoothing images.max_unreadable"),
            (-0.1, "be in [0, 1)", "model.dropout optim.ema_decay train.class_dropout"),
            (0.0, "be above 0", "model.mlp_ratio strategy.sampling_temperature"),
            (1.5, "be between 0 and 1", "train.reuse_probability"),
            (5, "be between 1 and 4", "train.programs"),
            (1, "be 0 or in [2, 65536)", "model.codebook_size"),
            (2**16, "be 0 or in [2, 65536)", "model.codebook_size"),
            (-1, "be in [0, 4294967296)", "train.seed"),
            (2**32, "be in [0, 4294967296)", "train.seed"),
            (2**31, "be below 2**31", "train.steps mesh.data images.shard_size"),
            ("1e999", "be finite", "optim.learning_rate strategy.guidance_scale"),
            (10**400, "be finite", "optim.epsilon"),
            (1e39, "be finite in float32", "optim.max_grad_norm strategy.guidance_scale"),
            (1e-50, "be above 0 in float32", "strategy.sampling_temperature model.mlp_ratio"),
            (1 - 1e-10, "be in [0, 1) in float32", "optim.ema_decay model.dropout"),
            (10**9, "be between 1 and 1024", "data.read_threads images.read_threads"
             " model.encoder_depth"),
            (-1, "be at least 0", "loss.l1 loss.l2 loss.codebook_start loss.codebook loss.lpips"
             " loss.commitment loss.restart_after loss.adversarial loss.adversarial_start"
             " discriminator.levels discriminator.learning_rate"),
            (0, "be at least 1", "model.channels model.num_res_blocks model.latent_channels"
             " model.norm_groups train.image_size held_out.images held_out.pictures"
             " held_out.batch_size discriminator.channels"),
            (1, "be in [2, 65536)", "model.codebook_size"),
        ],
    )  # fmt: skip
    def test_all_values_beyond_their_limits_are_named_at_once(self, value, must, names):
        of_tokenizer = "loss." in names or "held_out." in names or must == "be in [2, 65536)"
        kind, fields = (TokenizerRunConfig, PHOTOS) if of_tokenizer else (Config, {})
        problems = refusals(*(f"{n}={value}" for n in names.split()), kind=kind, fields=fields)
        assert {problem.split(" = ")[0] for problem in problems} == set(names.split())
        assert all(problem.endswith(f" must {must}") for problem in problems), problems


RULES = [
    ("model.width=65 model.num_heads=4",
     "model.width = 65 must be a multiple of model.num_heads = 4"),
    ("strategy.steps=257", "strategy.steps = 257 must be between 1 and model.length = 256"),
    ("train.batch_size=100", "train.batch_size = 100 must be a multiple of train.images_per_row = 8"
     " x train.accumulation = 1"),
    ("tokenizer.grid=(8,8)", "model.length = 256 must be the product of tokenizer.grid = (8, 8)"),
    ("optim.decay=cosine train.steps=9", "optim.warmup_steps = 5000 must be below train.steps = 9"),
    ("tokenizer.name=pixels", "model.codebook_size = 1024 must be 2 to 256 greys for"),
    ("tokenizer.name=vqgan", "tokenizer.weights = '' must name the workdir of a VQGAN"),
    ("tokenizer.name=patches", "tokenizer.weights = '' must name the workdir of patches"),
    ("strategy.schedule=sqrt strategy.steps=200", "strategy: mask_ratio leaves no token"),
    ("train.profile_steps=(3,2)", "train.profile_steps = (3, 2) must be the first and the last"),
    ("train.profile_steps=(0,2)", "train.profile_steps = (0, 2) must be the first and the last"),
    ("model.name=autonat", "train.reuse_probability = 0.5 must be 0 for a network that carries no"),
    ("model.name=autonat model.depth=3 train.reuse_probability=0.0",
     "model.depth = 3 must be an even number"),
    ("model.blocked=masked_to_masked", "model.blocked = 'masked_to_masked' must be 'none' where"),
    ("model.decoder_depth=0", "model.decoder_depth = 0 must be 0 where one stack is shared, else"),
    ("model.stacks=shared model.decoder_depth=0",
     "model.reuse = 'last_layer' must be 'none' with model.stacks = 'shared'"),
    ("model.stacks=shared model.decoder_depth=0 model.reuse=none train.reuse_probability=0.0"
     " model.context_attention=alternating", "model.context_attention = 'alternating' must be"),
    ("model.mlp_ratio=1e-9", "model.mlp_ratio = 1e-09 must give the MLPs of model.width = 768 at"),
    ("model.mlp_ratio=1e9", "model.mlp_ratio = 1000000000.0 must give the MLPs of model.width ="),
    ("model.attention=cudnn", "model.attention = 'cudnn' needs bfloat16, not model.dtype"),
    ("model.attention=cudnn model.dtype=bfloat16 model.width=36 model.num_heads=3",
     "model.width = 36 must be a multiple of 8 x model.num_heads = 3 with model.attention"),
    *((f"strategy.rule=maskgit strategy.{field}={value}",
       f"strategy: generation strategy: {field} must be within [{low}, 1e+06]")
      for field, value, low in (("sampling_temperature", 1e-30, "1e-06"),
                                ("sampling_temperature", 1e7, "1e-06"),
                                ("guidance_scale", 1e30, "0"), ("choice_temperature", 1e30, "0"))),
    ("model.reuse=none train.reuse_probability=0.0 model.reuse_projection=False",
     "model.reuse_projection = False must be True with model.reuse = 'none'"),
]  # fmt: skip
TOKENIZER_RULES = [
    ("images.name='' held_out.split=''", "images.folder = '' or images.name = '': give one of"),
    ("images.folder=mine", "images.folder = 'mine' or images.name = 'photos': give one of them"),
    ("held_out.folder=mine", "held_out.folder = 'mine' and held_out.split = 'test': give one of"),
    ("images.name='' images.folder=mine", "held_out.split = 'test' needs images.name"),
    ("train.image_size=60", "train.image_size = 60 must be a multiple of model.patch = 8"),
    ("model.channel_multipliers=()", "model.channel_multipliers = () must hold one for each level"),
    ("model.norm_groups=5", "model.norm_groups = 5 must divide the channels of every level that"),
    ("loss.codebook_start=2000", "loss.codebook_start = 2000 must be below train.steps = 2000"),
]


PATCHES = read_fields("configs/emoji_tokenizer.py")
PATCHES_RULES = [
    ("images.folder=mine", "images.folder = 'mine' or images.name = 'emoji': give one of them"),
    ("train.image_size=25", "train.image_size = 25 must be a multiple of model.patch = 3"),
    ("model.channels=3", "model.channels = 3 is no field of model"),
]
FIELDS = {Config: {}, TokenizerRunConfig: PHOTOS, PatchesRunConfig: PATCHES}


class TestRules:
    @pytest.mark.parametrize(
        ("kind", "texts", "problem"),
        [
            *((Config, *rule) for rule in RULES),
            *((TokenizerRunConfig, *r) for r in TOKENIZER_RULES),
            *((PatchesRunConfig, *r) for r in PATCHES_RULES),
        ],
    )
    def test_what_does_not_go_together_is_one_problem(self, kind, texts, problem):
        (only,) = refusals(*texts.split(), kind=kind, fields=FIELDS[kind])
        assert only.startswith(problem)

    def test_pixels_may_leave_their_number_of_greys_to_the_records(self):
        config_from_dict({}, ["tokenizer.name=pixels", "model.codebook_size=0"])

    def test_a_constant_rate_may_end_while_it_warms_up(self):
        config_from_dict({}, ["train.steps=100"])

    def test_names_types_values_and_rules_are_all_told_at_once(self):
        wrong = {"optim.learning_rate": "fast", "train.steps": 0, "model.widht": 3, "data": 3,
                 "strategy.steps": 999, "mesh.placement": "all", "tokenizer.grid": 16}  # fmt: skip
        problems = refusals(*(f"{name}={value}" for name, value in wrong.items()))
        assert {problem.split(" = ")[0] for problem in problems} == set(wrong)


class TestFields:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("model.width=32.0", "must be of type int"),
            ("model.width=true", "must be of type int"),
            ("model.width=True", "must be of type int"),
            ("optim.learning_rate=False", "must be of type float"),
            ("data.cache=1", "must be of type bool"),
            ("data.name=3", "must be of type str"),
            ("tokenizer.grid=(16, 16, 1)", "must be of type tuple[int, int]"),
            ("tokenizer.grid=(16, 'x')", "tokenizer.grid[1] = 'x' must be of type int"),
            ("tokenizer.grid=(16, 0)", "tokenizer.grid[1] = 0 must be at least 1"),
            ("optim.betas=(0.5, 1)", "optim.betas[1] = 1.0 must be in [0, 1)"),
            ("train.mask_beta=(0.0, 3.0)", "train.mask_beta[0] = 0.0 must be above 0"),
            ("model.dtype=float16", "must be one of 'float32', 'bfloat16'"),
            ("model=[1]", "must be a section of fields"),
            ("model.name=[1]", "must be one of 'enat', 'autonat'"),
            ("model.widht=32", "is no field of model (did you mean width?)"),
            ("trian.steps=3", "is no field of the config (did you mean train?)"),
            ("=3", "is no field of the config"),
            ("model.width", "is not of the form section.field=value"),
            ("data.name.x=3", "is no section"),
            (f"data.cache={'-' * 100_000}1", "must be of type bool"),
        ],
    )
    def test_what_cannot_be_is_refused_with_what_could(self, text, problem):
        (only,) = refusals(text, fields={"data": {"name": "digits"}})
        assert text.partition("=")[0].split(".")[0] in only
        assert only.endswith(problem)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("model.width=96", 96),
            ("optim.learning_rate=1", 1.0),
            ("optim.learning_rate=1e-3", 1e-3),
            ("optim.betas=(0.9, 1e-2)", (0.9, 0.01)),
            ("optim.betas=[0, 0.5]", (0.0, 0.5)),
            ("data.name='imagenet'", "imagenet"),
            ("data.data_dir=gs://bucket/a=b", "gs://bucket/a=b"),
            ("data.split=train[:90%]", "train[:90%]"),
            ("data.cache=False", False),
            ("mesh.fsdp=-1", -1),
        ],
    )
    def test_an_override_is_read_as_its_field_says(self, text, value):
        section, _, field = text.partition("=")[0].partition(".")
        read = getattr(getattr(config_from_dict({}, [text]), section), field)
        assert (read, type(read)) == (value, type(value))

    def test_the_last_override_counts_and_the_mapping_given_stays_as_it_is(self):
        fields = {"train": {"seed": 1}}
        assert config_from_dict(fields, ["train.seed=2", "train.seed=3"]).train.seed == 3
        assert fields == {"train": {"seed": 1}}

    def test_a_section_given_in_part_keeps_its_configs_own_defaults(self):
        optim = make_config(TokenizerRunConfig, PHOTOS | {"optim": {"epsilon": 0.1}}).optim
        assert optim == dataclasses.replace(TokenizerRunConfig().optim, epsilon=0.1)

    def test_the_network_named_has_its_own_fields(self):
        fields = {"model": {"name": "autonat", "depth": 6}, "train": {"reuse_probability": 0.0}}
        assert config_from_dict(fields).model == AutoNATConfig(depth=6)


class TestFile:
    @pytest.fixture
    def write(self, tmp_path):
        def write(body, name="experiment.py"):
            text = "from enat_jax.config_file import base\nfrom ml_collections import ConfigDict\n"
            (tmp_path / name).write_text(text + body)
            return str(tmp_path / name)

        return write

    def test_what_a_file_leaves_out_keeps_its_default_and_overrides_reach_it(self, write):
        path = write("def get_config(): return ConfigDict({'train': {'seed': 7}})")
        train = dataclasses.replace(Config().train, seed=7, steps=500)
        expected = dataclasses.replace(Config(), train=train)
        assert load_config(path, ["train.steps=500"]) == expected

    def test_an_argument_after_a_colon_goes_to_the_file(self, write):
        path = write("def get_config(seed): return ConfigDict({'train': {'seed': int(seed)}})")
        assert load_config(f"{path}:3").train.seed == 3

    def test_a_colon_may_be_in_its_path(self, write, tmp_path):
        (tmp_path / "12:30").mkdir()
        path = write("def get_config(seed='4'): return ConfigDict({'train': {'seed': int(seed)}})",
                     "12:30/of:mine.py")  # fmt: skip
        assert [load_config(text).train.seed for text in (path, f"{path}:3")] == [4, 3]

    def test_a_config_starts_from_another_beside_it(self, write):
        write("def get_config(): return ConfigDict({'train': {'seed': 7, 'steps': 5}})", "one.py")
        path = write("def get_config():\n"
                     "    config = base(__file__, 'one.py')\n"
                     "    config.train.steps = 6\n"
                     "    return config")  # fmt: skip
        assert read_fields(path) == {"train": {"seed": 7, "steps": 6}}

    @pytest.mark.parametrize(
        ("body", "part"),
        [
            ("def get_config(: pass", "SyntaxError"),
            ("import no_such_module", "ModuleNotFoundError"),
            ("x = 1", "AttributeError"),
            ("def get_config(): return {'model': {}}", "gave no ConfigDict"),
            ("def get_config(): return base(__file__, 'none.py')", "no config file"),
            ("import sys; sys.exit(0)", "SystemExit: 0"),
            ("class Odd(BaseException): pass\nraise Odd('x')", "Odd: x"),
            (
                "from ml_collections.config_dict import required_placeholder\n"
                "def get_config(): return ConfigDict({'seed': required_placeholder(int)})",
                "RequiredValueError",
            ),
        ],
    )
    def test_a_file_that_is_no_config_is_refused_in_a_line(self, write, body, part):
        with pytest.raises(UserError, match=part):
            load_config(write(body))

    def test_a_missing_file_is_named(self):
        with pytest.raises(UserError, match=r"no config file 'configs/digit\.py'"):
            load_config("configs/digit.py")
