"""ENAT-S whose every encoder block reuses the features of its own depth.

    enat train --config=configs/ablations/reuse_all_layers.py --workdir=runs/ablation

The paper reports FID 5.77 and 36.1 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us. Features of a layer are what its block
returns, each layer has a projection of its own, and the decoder reads the last one's; how the paper
did it is in no text we could read.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update({"model": {"reuse": "all_layers"}})
    return config
