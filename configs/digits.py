"""ENAT on scikit-learn's handwritten digits: 8 x 8 pixels are the tokens, grey levels the codes.

enat train --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "length": 64,
                "codebook_size": 17,
                "num_classes": 10,
                "width": 64,
                "num_heads": 4,
                "encoder_depth": 3,
                "decoder_depth": 2,
                "dropout": 0.0,
            },
            "tokenizer": {"name": "pixels", "grid": (8, 8)},
            "data": {"name": "digits", "data_dir": "data"},
            "optim": {
                "learning_rate": 2e-3,
                "warmup_steps": 200,
                "decay": "cosine",
                "betas": (0.9, 0.99),
                "max_grad_norm": 1.0,
                "ema_decay": 0.998,
            },
            "train": {
                "steps": 3500,
                "batch_size": 64,
                "images_per_row": 4,
                "programs": 2,
                "mask_beta": (4.0, 2.0),
                "class_dropout": 0.1,
                "label_smoothing": 0.0,
                "log_every": 100,
                "sample_every": 2000,
                "checkpoint_every": 1000,
            },
            "strategy": {
                "rule": "maskgit",
                "steps": 8,
                "guidance_scale": 1.0,
                "choice_temperature": 32.0,
                "sampling_temperature": 1.0,
            },
            "sample": {"batch_size": 20},
        }
    )
