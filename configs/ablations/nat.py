"""The paper's baseline, a NAT: all tokens run through 8 shared blocks and read each other.

    enat train --config=configs/ablations/nat.py --workdir=runs/ablation

The paper reports FID 6.54 and 39.6 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update(
        {"stacks": "shared", "reuse": "none", "width": 288, "encoder_depth": 8, "decoder_depth": 0}
    )
    config.train.reuse_probability = 0.0
    return config
