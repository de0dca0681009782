r"""ENAT-B on ImageNet 256 x 256 (219M parameters).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat tokenize --config=configs/enat_b_256.py --check=records.png
    enat train --config=configs/enat_b_256.py --workdir=runs/enat_b_256
    enat evaluate --workdir=runs/enat_b_256 --out=fid.json \
        --config.evaluate.inception=pt_inception-2015-12-05-6726825d.pth \
        --config.evaluate.reference=statistics.npz

The first file is MAGE's tokenizer, the reference statistics are ADM's or U-ViT's for 256 pixels, or
made by `enat statistics` from the same images. `tokenize` reads ImageNet as TFDS prepared it.

The paper reports FID 3.53 and IS 302.4 at 8 steps (5.86 at 4 steps) after 500k steps.
It trained with a batch of 2048 images over 16 processes; on which accelerators and for how long is
in no text we could read. Its generation strategy for this size is not published: the numbers below
are ENAT-L's. Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_l_256.py")
    config.update(
        {"model": {"width": 768, "num_heads": 8, "encoder_depth": 15, "decoder_depth": 1}}
    )
    return config
