"""Visible tokens through 12 blocks, masked ones through 4 others; no reuse.

    enat train --config=configs/ablations/disentangled_12_4.py --workdir=runs/ablation

The paper reports FID 4.98 and 38.2 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update(
        {
            "model": {"reuse": "none", "width": 318, "encoder_depth": 12, "decoder_depth": 4},
            "train": {"reuse_probability": 0.0},
        }
    )
    return config
