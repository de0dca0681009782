"""1,024 patches of 3 x 3 pixels for OpenMoji's pictures: 24 x 24 pixels to 8 x 8 tokens.

enat train_tokenizer --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer

The pictures come from PyPI (`pip install -e '.[emoji]'`) and are drawn first: half a minute.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {"name": "patches", "patch": 3, "codebook_size": 1024},
            "images": {"name": "emoji", "data_dir": "data"},
            "train": {"image_size": 24, "images": 4000},
        }
    )
