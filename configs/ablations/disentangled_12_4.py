"""Visible tokens through 12 blocks, masked ones through 4 others; no reuse.

    enat train --config=configs/ablations/disentangled_12_4.py --workdir=runs/ablation

The paper reports FID 4.98 and 38.2 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update({"reuse": "none", "width": 318, "encoder_depth": 12, "decoder_depth": 4})
    config.train.reuse_probability = 0.0
    return config
