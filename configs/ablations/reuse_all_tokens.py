"""ENAT-S that reuses the features of all tokens, masked ones included.

    enat train --config=configs/ablations/reuse_all_tokens.py --workdir=runs/ablation

The paper reports FID 4.95 and 37.5 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us. The encoder and the decoder read them; from
the second step on, when those of the first exist.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update({"model": {"reuse": "all_tokens"}})
    return config
