"""The baseline without attention from masked to visible tokens.

    enat train --config=configs/ablations/nat_masked_to_visible.py --workdir=runs/ablation

The paper reports FID 201.88 at 8 steps after 300k steps (ENAT, ablations). Not trained by us. A
token always reads itself here; whether it did in the paper is in no text we could read.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ENAT_S = pathlib.Path(__file__).parents[1] / "enat_s_256.py"


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ENAT_S))["get_config"]()
    config.model.update(
        {
            "stacks": "shared",
            "reuse": "none",
            "width": 288,
            "encoder_depth": 8,
            "decoder_depth": 0,
            "blocked": "masked_to_visible",
        }
    )
    config.train.reuse_probability = 0.0
    return config
