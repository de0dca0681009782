"""What may import what, read from the source: nothing of the package is executed here."""

import ast
import itertools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "enat_jax"
LONGEST = 350  # lines of a file, about

# A room is a module, or a folder whose modules may import each other. A new file gets its room
# here, by decision.
LEVELS = [
    {"errors", "whole_files", "differences", "compilation_cache", "compile_clock", "loop_config",
     "accelerators", "plans", "strategy", "losses", "crops", "metrics.scores",
     "checkpoint_digests", "host_agreement"},
    {"models", "tokenizers", "metrics", "images", "record_plan", "records", "prepared",
     "digits.builder", "photos.builder", "stream", "data", "image_source", "checkpoint",
     "metric_log", "sharding", "optim", "config_file", "digests", "cluster", "roll_call", "gather",
     "similarity_figure", "study_folder"},
    {"generate", "training_step", "tokenizer_step", "read_ahead", "image_batches", "chunks",
     "hosts", "resume"},
    {"config", "tokenizer_config", "features"},
    {"tokenizer", "generation_program"},
    {"sample", "convert", "training_loop", "run"},
    {"train", "held_out", "tokenize_dataset", "check_records", "evaluate",
     "reference_statistics", "digits.score"},
    {"bench", "train_tokenizer", "aot", "objective"},
    {"search", "ablate", "similarity"},
    {"verbs"},
    {"__main__"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Same level, one way only: each pair is there because the second is a part of the first's work.
WITHIN_A_LEVEL = {
    ("metrics.scores", "errors"),  # says what is wrong
    ("metrics", "tokenizers"),  # LPIPS's network is made of the VQGAN's convolutions
    ("data", "prepared"),  # where prepared data sets lie
    ("data", "record_plan"),
    ("data", "stream"),  # the order that all hosts walk together
    ("image_source", "prepared"),
    ("prepared", "digits.builder"),  # prepares the data sets that the project ships
    ("prepared", "photos.builder"),
    ("prepared", "records"),  # knows an unfinished data set
    ("records", "record_plan"),
    ("digits.builder", "tokenizers"),  # its tokens are that tokenizer's
}


def module_name(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def room(module):
    """The room a module is in, None where nobody gave it one."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVEL), None)


def imported(tree):
    """Every module that a file imports, anywhere in it, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def own_imports(module):
    """The package's modules that a module imports."""
    found = set()
    for name in imported(TREES[module]):
        if name.split(".")[0] == "enat_jax":
            parts = name.split(".")[1:]
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            found.add(next((each for each in known if each in FILES), "__init__"))
    return found


def foreign_imports(module):
    return {name.split(".")[0] for name in imported(TREES[module])} - {"enat_jax"}


MODULES = sorted(set(FILES) - PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_level(module):
    assert room(module) is not None, f"enat_jax.{module} is in no room of LEVELS"


def test_every_room_is_there():
    assert {room(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_strictly_downward(module):
    here = room(module)
    for other in own_imports(module):
        there = room(other)
        assert there is not None, f"{module} imports the package {other}"
        if there == here or (here, there) in WITHIN_A_LEVEL:
            continue
        assert LEVEL[there] < LEVEL[here], f"{module} (level {LEVEL[here]}) imports {other}"


def test_no_imports_run_in_a_circle():
    reach = {module: own_imports(module) for module in MODULES}
    for middle, start, end in itertools.product(MODULES, MODULES, MODULES):
        if middle in reach[start] and end in reach[middle]:
            reach[start].add(end)
    assert [module for module in MODULES if module in reach[module]] == []


def test_exceptions_within_a_level_are_in_use():
    used = {(room(module), room(other)) for module in MODULES for other in own_imports(module)}
    assert used >= WITHIN_A_LEVEL


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_are_empty_but_for_what_users_import(package):
    assert own_imports(package) == ({"sample"} if package == "__init__" else set())


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("models.")])
def test_models_know_neither_sharding_nor_generation_nor_config(module):
    assert own_imports(module) & {"sharding", "generate", "config", "training_step"} == set()
    assert all(other.startswith("models.") or other == "plans" for other in own_imports(module))


@pytest.mark.parametrize("module", ["generate", "plans", "strategy", "losses"])
def test_generation_knows_no_model(module):
    assert not [other for other in own_imports(module) if other.startswith("models")]


def test_config_dicts_end_in_config():
    assert [m for m in FILES if "ml_collections" in foreign_imports(m)] == ["config_file"]


def test_configs_import_ml_collections_alone():
    for path in (ROOT / "configs").glob("*.py"):
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert names == {"ml_collections"}, path.name


def test_partition_specs_are_said_in_sharding_alone():
    found = [m for m in FILES if any("PartitionSpec" in n for n in imported(TREES[m]))]
    assert found == ["sharding"]


def test_logging_is_left_to_the_upper_levels():
    # Two below: `prepared` and `checkpoint` quieten the libraries they wrap; only `checkpoint` says
    # something itself, to a logger that its caller may replace by `warn`.
    below = {m for m in MODULES if "logging" in foreign_imports(m) and LEVEL[room(m)] < 3}
    assert below == {"prepared", "checkpoint"}


def test_level_0_needs_no_devices():
    for module in ("errors", "plans", "strategy", "metrics.scores"):
        assert foreign_imports(module) & {"jax", "flax", "optax", "grain"} == set(), module


def test_torch_and_tensorflow_are_never_imported():
    for module in FILES:
        assert foreign_imports(module) & {"torch", "tensorflow"} == set(), module


def test_what_is_imported_is_required():
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "absl": "absl-py",
             "orbax": "orbax-checkpoint"}  # fmt: skip
    required = (ROOT / "requirements.txt").read_text().lower().replace("_", "-")
    foreign = set().union(*map(foreign_imports, FILES)) - set(sys.stdlib_module_names)
    missing = [n for n in sorted(foreign)
               if names.get(n, n).lower().replace("_", "-") not in required]  # fmt: skip
    assert missing == []


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_short_and_says_what_it_is(module):
    lines = FILES[module].read_text().splitlines()
    assert len(lines) <= LONGEST
    docstring = ast.get_docstring(TREES[module])
    assert docstring, f"enat_jax.{module} has no docstring"
    assert docstring.splitlines()[0].endswith((".", "`.")), "its first line is a sentence"


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc", "registry", "factory"])
def test_no_file_is_a_drawer(name):
    assert not [module for module in FILES if module.rpartition(".")[2] == name]
