"""The table of accelerators."""

import pytest

from enat_jax.parallel.accelerators import ACCELERATORS, accelerator_of


def test_device_kinds_name_one_accelerator_each():
    kinds = [kind for known in ACCELERATORS for kind in known.device_kinds]
    assert len(kinds) == len(set(kinds))
    for known in ACCELERATORS:
        assert all(accelerator_of(kind) is known for kind in known.device_kinds)


@pytest.mark.parametrize(
    ("kind", "teraflops", "gib"),
    [("TPU v5 lite", 197, 16), ("TPU v5", 459, 95), ("TPU v6 lite", 918, 32),
     ("NVIDIA H100 80GB HBM3", 989, 80)],
)  # fmt: skip
def test_figures_are_the_vendors(kind, teraflops, gib):
    known = accelerator_of(kind)
    assert known is not None
    assert known.flops == teraflops * 1e12
    assert known.memory == gib * 2**30


def test_an_unknown_device_has_no_figures():
    assert accelerator_of("cpu") is None
