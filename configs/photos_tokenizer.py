"""A small VQGAN on crops of scikit-learn's two photographs: 64 x 64 pixels to 8 x 8 tokens.

enat train_tokenizer --config=configs/photos_tokenizer.py --workdir=runs/photos_tokenizer

Eight minutes of CPU time; 20.5 dB on held-out crops. All levels have the same width, so that
colours pass between resolutions by shortcuts alone, and norms have one group, so that they keep an
image's mean colour.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "channels": 24,
                "channel_multipliers": (1, 1, 1, 1),
                "num_res_blocks": 1,
                "latent_channels": 32,
                "codebook_size": 512,
                "norm_groups": 1,
            },
            "images": {"name": "photos", "data_dir": "data", "read_threads": 1},
            "held_out": {"split": "test", "images": 200, "batch_size": 50},
            "loss": {"codebook_start": 100, "restart_after": 30},
            "optim": {
                "learning_rate": 2e-3,
                "warmup_steps": 50,
                "decay": "cosine",
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "ema_decay": 0.98,
            },
            "train": {
                "steps": 2000,
                "batch_size": 8,
                "image_size": 64,
                "random_crops": False,
                "log_every": 100,
                "sample_every": 250,
                "checkpoint_every": 250,
            },
        }
    )
