"""ENAT-S that reuses features as they are, without a projection.

    enat train --config=configs/ablations/no_reuse_projection.py --workdir=runs/ablation

The paper reports FID 5.96 and 20.8 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update({"model": {"reuse_projection": False}})
    return config
