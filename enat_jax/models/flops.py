"""A network's matrix-product FLOPs by formula, two per multiply-add."""

from collections.abc import Sequence
from typing import Any

from enat_jax.core.plans import Bucket, Plan
from enat_jax.models.autonat import flops as autonat_flops
from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.enat import flops as enat_flops
from enat_jax.models.networks import NetworkConfig


def step_flops(cfg: NetworkConfig, plan: Plan, *, reuse: bool = True) -> float:
    """One network call on one branch of one image; what is done once left out.

    `reuse` says whether it is one of several that reuse features, where the plan does not tell.
    """
    if isinstance(cfg, AutoNATConfig):
        return autonat_flops.step_flops(cfg, plan)
    return enat_flops.step_flops(cfg, plan, reuse=reuse)


def condition_flops(cfg: NetworkConfig) -> float:
    """What is done once per image and branch, before the first step."""
    return _of(cfg).condition_flops(cfg)


def generation_flops(cfg: NetworkConfig, buckets: Sequence[Bucket], *, padded: bool) -> float:
    """Generating one image, with or without what the buckets' padding adds."""
    branches = 2 if any(bucket.guided for bucket in buckets) else 1
    total = branches * condition_flops(cfg)
    reuse = any(plan.previous for bucket in buckets for plan in bucket.plans)
    for bucket in buckets:
        for plan in bucket.plans:
            shape = bucket.shape if padded else plan
            total += (2 if bucket.guided else 1) * step_flops(cfg, shape, reuse=reuse)
    return total


def padding(cfg: NetworkConfig, buckets: Sequence[Bucket]) -> float:
    """Extra FLOPs of the buckets' padding, as a fraction of the exact ones."""
    padded, exact = (generation_flops(cfg, buckets, padded=padded) for padded in (True, False))
    return padded / exact - 1


def training_flops(cfg: NetworkConfig, plans: Sequence[Plan]) -> float:
    """One image of a training step, averaged over the plans of a row."""
    return sum(_of(cfg).training_flops(cfg, plan) for plan in plans) / len(plans)


def _of(cfg: NetworkConfig) -> Any:
    return autonat_flops if isinstance(cfg, AutoNATConfig) else enat_flops
