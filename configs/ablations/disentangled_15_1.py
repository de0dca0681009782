"""Visible tokens through 15 blocks, masked ones through 1; no reuse.

    enat train --config=configs/ablations/disentangled_15_1.py --workdir=runs/ablation

The paper reports FID 4.78 and 39.8 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update({"model": {"reuse": "none"}, "train": {"reuse_probability": 0.0}})
    return config
