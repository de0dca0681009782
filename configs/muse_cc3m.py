r"""MUSE's network on CC3M 256 x 256 (503.6M parameters), AutoNAT's on captions.

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat convert --kind=clip_text --source=open_clip_pytorch_model.bin --out=runs/clip_bigg
    enat convert --kind=muse --source=cc3m-285000.ckpt/nnet_ema.pth \
        --config=configs/muse_cc3m.py --out=runs/muse_cc3m
    enat sample --workdir=runs/muse_cc3m --out=cats.png --prompt="two cats on a red sofa"

Or trained here, on the records of `configs/adanat_cc3m.py`:

    enat train --config=configs/muse_cc3m.py --workdir=runs/muse_cc3m

The weights are MUSE-Pytorch's, whose authors report FID 6.84 on 30,000 images of MS-COCO at 18
steps. Its text encoder is CLIP ViT-bigG/14 of open_clip, the last hidden state of 77 tokens, padded
with 0. Its rule ranks by logits; guidance grows linearly to 10, and one temperature scales the
noise of tokens and of confidence.

The published files have been read by none of us: the import is tested on recordings of the
network's own code and on the file's names and shapes.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "adanat_cc3m.py")
    config.update(
        {
            "strategy": {
                "rule": "enat",
                "steps": 18,
                "masking": "autonat",
                "ranking": "logit",
                "guidance_scale": 10.0,
                "choice_temperature": 4.5,
                "sampling_temperature": 4.5,
            }
        }
    )
    return config
