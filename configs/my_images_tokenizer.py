r"""A VQGAN on a folder of your own images: one folder per class, 128 x 128 pixels to 8 x 8 tokens.

    enat train_tokenizer --config=configs/my_images_tokenizer.py --workdir=runs/my_vqgan \
        --config.images.folder=my_images

MaskGIT's network at half its width: 16 pixels a token. Images of other sizes are cropped. With
VGG16's and LPIPS's weights add `--config.loss.lpips_weights=...`, with Inception's
`--config.held_out.inception=...` for rFID. The discriminator joins in after 20,000 steps.
`configs/my_images.py` goes on from here. Not trained by us: the losses and the loop are those of
`configs/photos_tokenizer.py`, which is.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "channels": 64,
                "channel_multipliers": (1, 1, 2, 2, 4),
                "num_res_blocks": 2,
                "latent_channels": 256,
                "codebook_size": 1024,
                "dtype": "bfloat16",
            },
            "images": {"folder": "my_images"},
            "loss": {
                "codebook_start": 1000,
                "restart_after": 200,
                "adversarial": 0.1,
                "adversarial_start": 20000,
            },
            "optim": {
                "learning_rate": 2e-4,
                "warmup_steps": 1000,
                "decay": "cosine",
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "ema_decay": 0.999,
            },
            "train": {
                "steps": 100000,
                "batch_size": 64,
                "image_size": 128,
                "log_every": 100,
                "sample_every": 2000,
                "checkpoint_every": 2000,
            },
        }
    )
