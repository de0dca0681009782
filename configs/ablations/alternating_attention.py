"""ENAT-S with a self-attention and then a cross-attention in every block.

    enat train --config=configs/ablations/alternating_attention.py --workdir=runs/ablation

The paper reports FID 5.85 and 25.0 GFLOPs (multiply-adds, without the VQGAN's decoder) at 8 steps
after 300k steps (ENAT, ablations). Not trained by us. The cross-attention has its own queries,
output projection and adaLN vectors; the order is ours.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "../enat_s_256.py")
    config.update({"model": {"context_attention": "alternating"}})
    return config
