"""A recorded text tower as its users have it: weights, config and tokenizer in a folder."""

import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from tests.support.golden import GOLDEN
from tests.support.imports import clip_text

PART = pathlib.Path(__file__).parents[1] / "golden/clip_text"


def clip_source(folder, file="state_dict", **beside):
    """Writes it and gives the weights' path; `beside` are fields of its config.

    The tower has as many words as the tokenizer, the first of which are those recorded.
    """
    folder.mkdir(exist_ok=True)
    weights = dict(clip_text(f"clip_l/{file}.safetensors").weights)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name] = np.pad(weights[name], ((0, 49408 - len(weights[name])), (0, 0)))
    save_file(weights, folder / f"{file}.safetensors")
    told = json.loads((GOLDEN / "clip_text/clip_l/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"vocab_size": 49408} | beside))
    for part in ("vocab.json", "merges.txt"):
        shutil.copy(PART / part, folder)
    return folder / f"{file}.safetensors"
