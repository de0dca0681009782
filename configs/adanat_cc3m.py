r"""AdaNAT's network on CC3M 256 x 256 (503.6M parameters), AutoNAT's on captions.

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat convert --kind=clip_text --source=model.safetensors --out=runs/clip_bigg
    enat tokenize --config=configs/adanat_cc3m.py --check=records.png
    enat train --config=configs/adanat_cc3m.py --workdir=runs/adanat_cc3m
    enat sample --workdir=runs/adanat_cc3m --out=cats.png --prompt="two cats on a red sofa"

The images are CC3M's in tar files as img2dataset writes them, in `data/cc3m`. The text encoder is
CLIP ViT-bigG/14, the last hidden state of 77 tokens; captions are dropped to the empty one with a
probability of 0.15. The recipe is that of AdaNAT's code; its learned policy is not part of this
project, the strategy here is the manual one that the policy starts from. The number of steps is
MUSE's. Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_b_coco.py")
    del config.model.encoder_depth, config.model.decoder_depth
    config.update(
        {
            "model": {
                "name": "autonat",
                "width": 1152,
                "num_heads": 16,
                "depth": 28,
                "text_width": 1280,
            },
            "text": {"weights": "runs/clip_bigg"},
            "images": {"folder": "data/cc3m", "captions": "tar"},
            "data": {"name": "cc3m_256_tokens"},
            "optim": {"learning_rate": 4e-4, "betas": (0.99, 0.99)},
            "train": {
                "steps": 285_000,
                "batch_size": 2048,
                "mask_beta": (12.0, 3.0),
                "reuse_probability": 0.0,
                "class_dropout": 0.15,
                "mean_over": "tokens",
            },
            "strategy": {
                "steps": 18,
                "masking": "autonat",
                "guidance_scale": 10.0,
                "choice_temperature": 1.0,
                "sampling_temperature": 1.0,
                "rule": "maskgit",
            },
        }
    )
    return config
