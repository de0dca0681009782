"""Visible tokens through 8 blocks, masked ones through 8 others; no reuse.

    enat train --config=configs/ablations/disentangled_8_8.py --workdir=runs/ablation

The paper reports FID 5.50 and 40.2 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update(
        {
            "model": {"reuse": "none", "width": 288, "encoder_depth": 8, "decoder_depth": 8},
            "train": {"reuse_probability": 0.0},
        }
    )
    return config
