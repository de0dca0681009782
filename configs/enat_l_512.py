r"""ENAT-L on ImageNet 512 x 512 (575.1M parameters).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat tokenize --config=configs/enat_l_512.py --check=records.png
    enat train --config=configs/enat_l_512.py --workdir=runs/enat_l_512
    enat evaluate --workdir=runs/enat_l_512 --out=fid.json \
        --config.evaluate.inception=pt_inception-2015-12-05-6726825d.pth \
        --config.evaluate.reference=statistics.npz

The first file is MAGE's tokenizer, the reference statistics are ADM's or U-ViT's for 512 pixels, or
made by `enat statistics` from the same images. `tokenize` reads ImageNet as TFDS prepared it.

The paper reports FID 4.00 and IS 285.7 at 8 steps after 500k steps.
It trained with a batch of 512 images over 16 processes; on which accelerators and for how long is
in no text we could read. Not trained by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_l_256.py")
    config.update(
        {
            "model": {"length": 1024},
            "tokenizer": {"grid": (32, 32)},
            "data": {"name": "imagenet_512_tokens"},
            "optim": {"learning_rate": 0.0001},
            "train": {"batch_size": 512},
            "strategy": {"guidance_scale": 3.5, "sampling_temperature": 4.0},
        }
    )
    return config
