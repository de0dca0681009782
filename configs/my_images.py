r"""ENAT on a folder of your own images: one folder per class, 128 x 128 pixels.

    enat train_tokenizer --config=configs/my_images_tokenizer.py --workdir=runs/my_vqgan \
        --config.images.folder=my_images
    enat tokenize --config=configs/my_images.py --config.images.folder=my_images --check=records.png
    enat train --config=configs/my_images.py --workdir=runs/my_images
    enat sample --workdir=runs/my_images --out=grid.png

The number of classes and of codes are read from the token records, so nothing here needs to change
with the folder. MAGE's tokenizer serves as well as one's own (`enat convert --kind=vqgan`, then
`--config.tokenizer.weights=...`), at 16 x 16 tokens for 256 pixels. Sizes are ENAT-S's at a width
that every attention kernel takes; a single GPU or a few hours on many cores are enough for some
thousand images. No score is known for your images; `enat statistics` and `enat evaluate` give one.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "length": 64,
                "codebook_size": 0,
                "num_classes": 0,
                "width": 384,
                "num_heads": 6,
                "encoder_depth": 15,
                "decoder_depth": 1,
                "dropout": 0.1,
                "dtype": "bfloat16",
            },
            "tokenizer": {"name": "vqgan", "weights": "runs/my_vqgan", "grid": (8, 8)},
            "images": {"folder": "my_images"},
            "data": {"name": "my_tokens", "data_dir": "data"},
            "optim": {
                "learning_rate": 0.0004,
                "warmup_steps": 1000,
                "decay": "cosine",
                "weight_decay": 0.03,
                "betas": (0.99, 0.99),
                "ema_decay": 0.999,
            },
            "train": {
                "steps": 50000,
                "batch_size": 256,
                "images_per_row": 8,
                "programs": 4,
                "class_dropout": 0.1,
                "label_smoothing": 0.1,
                "sample_every": 2000,
                "checkpoint_every": 1000,
            },
            "strategy": {
                "rule": "enat",
                "steps": 8,
                "guidance_scale": 2.5,
                "choice_temperature": 1.5,
                "sampling_temperature": 6.0,
            },
        }
    )
