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

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_l_256.py")
    del config.model.encoder_depth, config.model.decoder_depth, config.strategy
    config.update(
        {
            "model": {"name": "autonat", "width": 768, "num_heads": 8, "depth": 24},
            "train": {"reuse_probability": 0.0, "class_dropout": 0.15, "mean_over": "tokens"},
            "strategy": {
                "rule": "file",
                "file": "configs/strategies/autonat_l_256_t8.yaml",
                "steps": 8,
                "masking": "autonat",
            },
        }
    )
    return config
