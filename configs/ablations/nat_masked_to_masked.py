"""The baseline without attention among masked tokens.

    enat train --config=configs/ablations/nat_masked_to_masked.py --workdir=runs/ablation

The paper reports FID 7.05 at 8 steps after 300k steps (ENAT, ablations). Not trained by us. A token
always reads itself here; whether it did in the paper is in no text we could read.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "nat.py")
    config.update({"model": {"blocked": "masked_to_masked"}})
    return config
