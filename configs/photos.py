"""A small ENAT on crops of scikit-learn's two photographs, a temple and a flower.

    enat train_tokenizer --config=configs/photos_tokenizer.py --workdir=runs/photos_tokenizer
    enat tokenize --config=configs/photos.py --check=runs/photos_records.png
    enat train --config=configs/photos.py --workdir=runs/photos
    enat sample --workdir=runs/photos --out=runs/photos/photos.png

`make photos` runs these four.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "length": 64,
                "codebook_size": 0,
                "num_classes": 0,
                "width": 96,
                "num_heads": 4,
                "encoder_depth": 3,
                "decoder_depth": 2,
                "dropout": 0.1,
            },
            "tokenizer": {"name": "vqgan", "weights": "runs/photos_tokenizer", "grid": (8, 8)},
            "images": {"name": "photos", "data_dir": "data", "read_threads": 2},
            "data": {"name": "photos_tokens", "data_dir": "data"},
            "optim": {
                "learning_rate": 0.002,
                "warmup_steps": 100,
                "decay": "cosine",
                "weight_decay": 0.03,
                "betas": (0.9, 0.99),
                "ema_decay": 0.998,
            },
            "train": {
                "steps": 2500,
                "batch_size": 64,
                "images_per_row": 4,
                "programs": 2,
                "mask_beta": (4.0, 2.0),
                "class_dropout": 0.1,
                "label_smoothing": 0.0,
                "log_every": 100,
                "sample_every": 1000,
                "checkpoint_every": 1000,
            },
            "strategy": {
                "rule": "enat",
                "steps": 8,
                "guidance_scale": 1.0,
                "choice_temperature": 4.5,
                "sampling_temperature": 1.5,
            },
            "sample": {"batch_size": 32},
        }
    )
