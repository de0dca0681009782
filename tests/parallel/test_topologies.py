"""Devices described by name."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from enat_jax.errors import UserError
from enat_jax.parallel import topologies
from enat_jax.parallel.topologies import describe

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize(
    "name",
    ["", "foo", "v9:4x4", "v5e", "v5e:", "v5ex16", "h100", "h100x0", "0xh100x8", "h100:8",
     "2xcpux1", "v5e:16x16*2"],
)  # fmt: skip
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(UserError) as caught:
        describe(name)
    message = str(caught.value)
    assert repr(name) in message
    for known in ("v4:", "v5e:16x16", "v5p:4x4x8", "v6e:", "2xv5e:16x16", "h100x8", "4xh100x8"):
        assert known in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["v5e:16", "v5e:4x4x4", "v5e:32x16", "v5p:4x4", "0xv5e:4x4",
                                  "v6e:0x4"])  # fmt: skip
def test_a_slice_of_an_impossible_shape_is_refused(name):
    with pytest.raises(UserError, match="sides of 1 to"):
        describe(name)


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'libtpu.*pip install -e "\.\[tpu\]"'):
        describe("v5e:4x4")
    with pytest.raises(UserError, match=r'CUDA plugin.*pip install -e "\.\[gpu\]"'):
        describe("h100x8")


def test_own_devices_are_a_topology_too():
    assert list(describe("cpux1")) == jax.devices("cpu")[:1]
    with pytest.raises(UserError, match="xla_force_host_platform_device_count=4096"):
        describe("cpux4096")


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200"])
def test_a_gpu_is_described_to_the_compiler_in_its_own_words(gpu, monkeypatch):
    asked = {}

    def get(name, platform, **options):
        asked.update(options, platform=platform, name=name)
        raise ValueError("not\nhere")

    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", get)
    with pytest.raises(UserError, match=f"topology '2x{gpu}x8': not here"):
        describe(f"2x{gpu}x8")
    assert (asked["platform"], asked["topology"]) == ("cuda", "2x1x8")
    assert gpu.upper() in asked["target_config"]
    assert asked["target_config"].count("{") == asked["target_config"].count("}")


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_tpu_slices_have_their_chips():
    """In a process of its own: the compiler is loaded for good."""
    names = ["v5e:1x1", "v5e:4x4", "v5p:2x2x4", "v6e:2x4", "v4:2x2x2", "2xv5e:4x4"]
    code = (
        "from enat_jax.parallel.topologies import describe\n"
        f"for name in {names}:\n"
        "    found = describe(name)\n"
        "    print(len(found), found[0].device_kind, len({d.process_index for d in found}),\n"
        "          len({getattr(d, 'slice_index', None) for d in found}), sep=';')\n"
        "import jax\n"
        "print(jax.default_backend())\n"
        "try:\n"
        "    describe('v5e:3x5')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[:6] == ["1;TPU v5 lite;1;1", "16;TPU v5 lite;4;1", "16;TPU v5;4;1",
                         "8;TPU v6 lite;2;1", "8;TPU v4;2;1", "32;TPU v5 lite;8;2"]  # fmt: skip
    assert lines[6] == "cpu"
    assert lines[7].startswith("topology 'v5e:3x5': ")
    assert result.stderr == ""
