"""The paper's baseline, a NAT: all tokens run through 8 shared blocks and read each other.

    enat train --config=configs/ablations/nat.py --workdir=runs/ablation

The paper reports FID 6.54 and 39.6 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update(
        {
            "model": {
                "stacks": "shared",
                "reuse": "none",
                "width": 288,
                "encoder_depth": 8,
                "decoder_depth": 0,
            },
            "train": {"reuse_probability": 0.0},
        }
    )
    return config
