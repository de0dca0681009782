r"""ENAT-L on ImageNet 256 x 256 (574M parameters).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat tokenize --config=configs/enat_l_256.py --check=records.png
    enat train --config=configs/enat_l_256.py --workdir=runs/enat_l_256
    enat evaluate --workdir=runs/enat_l_256 --out=fid.json \
        --config.evaluate.inception=pt_inception-2015-12-05-6726825d.pth \
        --config.evaluate.reference=statistics.npz
    enat bench --config=configs/enat_l_256.py --batch_sizes=1,4 --dtypes=float32,bfloat16

The first file is MAGE's tokenizer, the reference statistics are ADM's or U-ViT's for 256 pixels, or
made by `enat statistics` from the same images. `tokenize` reads ImageNet as TFDS prepared it.

The paper reports FID 2.79 and IS 326.7 at 8 steps (4.13 at 4 steps) after 500k steps.
It trained with a batch of 2048 images over 16 processes; on which accelerators and for how long is
in no text we could read. Not trained by us.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "length": 256,
                "codebook_size": 1024,
                "num_classes": 1000,
                "width": 1024,
                "num_heads": 16,
                "encoder_depth": 22,
                "decoder_depth": 2,
                "dropout": 0.1,
                "dtype": "bfloat16",
                "remat": "dots",
            },
            "tokenizer": {
                "name": "vqgan",
                "weights": "runs/vqgan",
                "grid": (16, 16),
            },
            "images": {"name": "imagenet2012", "data_dir": "data", "split": "train"},
            "data": {"name": "imagenet_256_tokens", "data_dir": "data"},
            "optim": {
                "learning_rate": 0.0004,
                "warmup_steps": 5000,
                "decay": "constant",
                "weight_decay": 0.03,
                "betas": (0.99, 0.99),
                "ema_decay": 0.9999,
            },
            "train": {
                "steps": 500000,
                "batch_size": 2048,
                "images_per_row": 8,
                "programs": 4,
                "mask_beta": (12.0, 3.0),
                "reuse_probability": 0.5,
                "class_dropout": 0.235,
                "label_smoothing": 0.1,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "placement": "zero2"},
            "strategy": {
                "rule": "enat",
                "steps": 8,
                "guidance_scale": 2.5,
                "choice_temperature": 1.5,
                "sampling_temperature": 6.0,
            },
            "evaluate": {"num_images": 50000},
        }
    )
