"""ENAT-S that reuses the features of all tokens, masked ones included.

    enat train --config=configs/ablations/reuse_all_tokens.py --workdir=runs/ablation

The paper reports FID 4.95 and 37.5 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us. The encoder and the decoder read them; from
the second step on, when those of the first exist.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update({"reuse": "all_tokens"})
    return config
