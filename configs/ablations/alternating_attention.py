"""ENAT-S with a self-attention and then a cross-attention in every block.

    enat train --config=configs/ablations/alternating_attention.py --workdir=runs/ablation

The paper reports FID 5.85 and 25.0 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us. The cross-attention has its own queries,
output projection and adaLN vectors; the order is ours.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update({"context_attention": "alternating"})
    return config
