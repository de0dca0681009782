r"""AutoNAT-L on ImageNet 256 x 256 (193.7M parameters).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat tokenize --config=configs/autonat_l_256.py --check=records.png
    enat train --config=configs/autonat_l_256.py --workdir=runs/autonat_l_256
    enat evaluate --workdir=runs/autonat_l_256 --out=fid.json \
        --config.evaluate.inception=pt_inception-2015-12-05-6726825d.pth \
        --config.evaluate.reference=statistics.npz

Published weights instead of training:

    enat convert --kind=autonat --source=nnet_ema.pth --config=configs/autonat_l_256.py \
        --out=runs/autonat_l_256

The tokenizer is the one of `configs/enat_l_256.py`. The strategy is the published one, searched for
this model at 8 steps. Training is ENAT's recipe with one mask ratio per image, drawn from
Beta(12, 3), and the class dropped for 15% of the images. A batch's ratios are quantiles of that
distribution here, not draws, and the loss is the mean over the masked tokens of all images.

The paper's result tables, the accelerators it trained on and for how long are in no text we could
read; the number of steps is ENAT's. Not trained by us.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "name": "autonat",
                "length": 256,
                "codebook_size": 1024,
                "num_classes": 1000,
                "width": 768,
                "num_heads": 8,
                "depth": 24,
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
                "reuse_probability": 0.0,
                "class_dropout": 0.15,
                "label_smoothing": 0.1,
                "mean_over": "tokens",
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "placement": "zero2"},
            "strategy": {
                "rule": "file",
                "file": "configs/strategies/autonat_l_256_t8.yaml",
                "steps": 8,
                "masking": "autonat",
            },
            "evaluate": {"num_images": 50000},
        }
    )
