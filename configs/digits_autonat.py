"""AutoNAT on scikit-learn's handwritten digits, as `configs/digits.py` has ENAT.

enat train --config=configs/digits_autonat.py --workdir=runs/digits_autonat
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "digits.py")
    del config.model.encoder_depth, config.model.decoder_depth
    config.update(
        {
            "model": {"name": "autonat", "depth": 4},
            "train": {
                "steps": 1500,
                "reuse_probability": 0.0,
                "mean_over": "tokens",
                "sample_every": 1500,
                "checkpoint_every": 500,
            },
            "strategy": {"masking": "autonat"},
        }
    )
    return config
