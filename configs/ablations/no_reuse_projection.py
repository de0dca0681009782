"""ENAT-S that reuses features as they are, without a projection.

    enat train --config=configs/ablations/no_reuse_projection.py --workdir=runs/ablation

The paper reports FID 5.96 and 20.8 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update({"reuse_projection": False})
    return config
