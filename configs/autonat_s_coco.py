r"""AutoNAT from captions on MS-COCO 256 x 256, the size of U-ViT-S (its own S is not published).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat convert --kind=clip_text --source=model.safetensors --out=runs/clip_l
    enat tokenize --config=configs/autonat_s_coco.py --check=records.png
    enat train --config=configs/autonat_s_coco.py --workdir=runs/autonat_s_coco
    enat sample --workdir=runs/autonat_s_coco --out=cats.png --prompt="two cats on a red sofa"

Files and images are those of `configs/enat_b_coco.py`. The caption's 77 tokens stand in the place
of the class token. Mask ratios are Beta(4, 1), second-hand. The paper's size, encoder and sampling
numbers are in no text we could read, nor its score. Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_b_coco.py")
    del config.model.encoder_depth, config.model.decoder_depth
    config.update(
        {
            "model": {"name": "autonat", "width": 512, "num_heads": 8, "depth": 12},
            "train": {
                "mask_beta": (4.0, 1.0),
                "reuse_probability": 0.0,
                "mean_over": "tokens",
            },
            "strategy": {"masking": "autonat"},
        }
    )
    return config
