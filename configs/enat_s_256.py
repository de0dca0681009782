r"""ENAT-S on ImageNet 256 x 256, the size of the paper's ablations (50.4M parameters).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat tokenize --config=configs/enat_s_256.py --check=records.png
    enat train --config=configs/enat_s_256.py --workdir=runs/enat_s_256
    enat evaluate --workdir=runs/enat_s_256 --out=fid.json \
        --config.evaluate.inception=pt_inception-2015-12-05-6726825d.pth \
        --config.evaluate.reference=statistics.npz

The first file is MAGE's tokenizer, the reference statistics are ADM's or U-ViT's for 256 pixels, or
made by `enat statistics` from the same images. `tokenize` reads ImageNet as TFDS prepared it.

The paper reports FID 4.97 at 8 steps after 300k steps (ENAT, ablations).
It trained with a batch of 2048 images over 16 processes; on which accelerators and for how long is
in no text we could read. Its generation strategy for this size is not published: the numbers below
are ENAT-L's. Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_l_256.py")
    config.update(
        {
            "model": {"width": 366, "num_heads": 6, "encoder_depth": 15, "decoder_depth": 1},
            "train": {"steps": 300000},
        }
    )
    return config
