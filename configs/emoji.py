"""A small ENAT on OpenMoji's pictures at 24 x 24 pixels.

    enat train_tokenizer --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer
    enat tokenize --config=configs/emoji.py --batch_size=256
    enat train --config=configs/emoji.py --workdir=runs/emoji

`make emoji` runs these three, scores the run on captions whose role, gender and skin tone were
never trained on together, and draws some of them beside the real pictures. The strategy was chosen
among nine on the validation split.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "length": 64,
                "codebook_size": 1024,
                "num_classes": 0,
                "condition": "text",
                "text_width": 64,
                "width": 128,
                "num_heads": 4,
                "encoder_depth": 4,
                "decoder_depth": 2,
                "dropout": 0.0,
            },
            "tokenizer": {"name": "patches", "weights": "runs/emoji_tokenizer", "grid": (8, 8)},
            # "facing right" is in captions: no mirrored pictures
            "images": {"name": "emoji", "data_dir": "data", "flips": False, "read_threads": 2},
            "text": {"name": "words"},
            "data": {"name": "emoji_tokens", "data_dir": "data"},
            "optim": {
                "learning_rate": 2e-3,
                "warmup_steps": 200,
                "decay": "cosine",
                "betas": (0.9, 0.99),
                "max_grad_norm": 1.0,
                "ema_decay": 0.998,
            },
            "train": {
                "steps": 3000,
                "batch_size": 64,
                "images_per_row": 16,
                "programs": 2,
                "strata": "drawn",
                "mask_beta": (4.0, 2.0),
                "class_dropout": 0.1,
                "label_smoothing": 0.0,
                "log_every": 100,
                "sample_every": 1000,
                "checkpoint_every": 1000,
            },
            "strategy": {
                "rule": "maskgit",
                "steps": 8,
                "guidance_scale": 1.0,
                "choice_temperature": 4.5,
                "sampling_temperature": 1.0,
            },
            "sample": {"batch_size": 32},
        }
    )
