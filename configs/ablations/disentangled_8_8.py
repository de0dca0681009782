"""Visible tokens through 8 blocks, masked ones through 8 others; no reuse.

    enat train --config=configs/ablations/disentangled_8_8.py --workdir=runs/ablation

The paper reports FID 5.50 and 40.2 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update({"reuse": "none", "width": 288, "encoder_depth": 8, "decoder_depth": 8})
    config.train.reuse_probability = 0.0
    return config
