"""Visible tokens through 15 blocks, masked ones through 1; no reuse.

    enat train --config=configs/ablations/disentangled_15_1.py --workdir=runs/ablation

The paper reports FID 4.78 and 39.8 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update({"reuse": "none"})
    config.train.reuse_probability = 0.0
    return config
