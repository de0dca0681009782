r"""ENAT-B from captions on MS-COCO 256 x 256 (139M parameters; the paper's 116M below).

    enat convert --kind=vqgan --source=vqgan_jax_strongaug.ckpt --out=runs/vqgan
    enat convert --kind=clip_text --source=model.safetensors --out=runs/clip_l
    enat tokenize --config=configs/enat_b_coco.py --check=records.png
    enat train --config=configs/enat_b_coco.py --workdir=runs/enat_b_coco
    enat sample --workdir=runs/enat_b_coco --out=cats.png --prompt="two cats on a red sofa"

The first file is MAGE's tokenizer, the second CLIP ViT-L/14's text tower as Hugging Face has it,
with `config.json`, `vocab.json` and `merges.txt` beside it. The images are COCO's of 2014, unpacked
into `data/coco/train2014`, with `data/coco/annotations/captions_train2014.json`: 82,783 images of
five captions, one of which is drawn each time that an image is seen.

The paper reports FID 6.82 at 8 steps for 116M parameters and 0.3 TFLOPs, on 30,000 images, after
150k steps. Its text encoder and its sampling numbers are in no text we could read; the recipe is
U-ViT's, which it names. Its parameters and FLOPs fit one projection to keys and values for own and
context tokens, no reuse projection, and a caption that is encoded beside the new tokens at every
step (115.6M, 0.32 TFLOPs with the image decoder):

    --config.model.key_value=shared --config.model.reuse_projection=False \
    --config.model.text_every_step=True

Here a caption is encoded once (0.23 TFLOPs). The generation strategy is the classes'. Not trained
by us.
"""

from ml_collections import ConfigDict

from enat_jax.config_file import base


def get_config() -> ConfigDict:
    config = base(__file__, "enat_b_256.py")
    del config.images.name, config.images.data_dir, config.images.split
    config.update(
        {
            "model": {
                "num_classes": 0,
                "condition": "text",
                "text_length": 77,
                "text_width": 768,
            },
            "text": {"name": "clip", "weights": "runs/clip_l"},
            "images": {
                "folder": "data/coco/train2014",
                "captions": "data/coco/annotations/captions_train2014.json",
            },
            "data": {"name": "coco_256_tokens"},
            "optim": {
                "learning_rate": 2e-4,
                "warmup_steps": 5000,
                "weight_decay": 0.03,
                "betas": (0.9, 0.9),
            },
            "train": {"steps": 150_000, "batch_size": 256, "class_dropout": 0.1},
            "evaluate": {"num_images": 30_000},
        }
    )
    return config
