"""The import tables of VQGAN weights published for PyTorch (MAGE) and for Flax (MaskGIT).

Both name the parameters of one network, PyTorch's being a port of Flax's. What is known of them:

* MAGE's `vqgan_jax_strongaug.ckpt`: MAGE's and ENAT's `VQModel` load it with `strict=True`, from
  the entry `state_dict` where there is one, so it holds these tensors and no others. Sizes are
  those of MAGE's `config/vqgan.yaml`.
* MaskGIT's `tokenizer_imagenet256_checkpoint` and `..512..`: names follow from the order in which
  `nets/vqgan_tokenizer.py` calls its layers, and public converters to PyTorch read them so; one
  size serves both resolutions. `Module.apply` takes the whole file, so its top level is `params`.

The files themselves were not at hand: what they hold beyond this would be refused by name.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from enat_jax.errors import UserError
from enat_jax.models.import_table import Rule, Weights, count_names, window_first
from enat_jax.tokenizers.vqgan import VQGANConfig

Layout = Literal["torch", "flax"]

_CODEBOOKS: dict[str, Layout] = {"quantize.embedding.weight": "torch", "quantizer.codebook": "flax"}

# our path, PyTorch name, Flax name; Flax numbers convolutions as they run, {last} the last
TABLE = [
    ("codebook", "quantize.embedding.weight", "quantizer.codebook"),
    ("encoder.conv_in.kernel", "encoder.conv_in.weight", "encoder.Conv_0.kernel"),
    ("encoder.norm_out.scale", "encoder.norm_out.weight", "encoder.GroupNorm_0.scale"),
    ("encoder.norm_out.bias", "encoder.norm_out.bias", "encoder.GroupNorm_0.bias"),
    ("encoder.conv_out.kernel", "encoder.conv_out.weight", "encoder.Conv_1.kernel"),
    ("encoder.conv_out.bias", "encoder.conv_out.bias", "encoder.Conv_1.bias"),
    ("decoder.conv_in.kernel", "decoder.conv_in.weight", "decoder.Conv_0.kernel"),
    ("decoder.conv_in.bias", "decoder.conv_in.bias", "decoder.Conv_0.bias"),
    ("decoder.norm_out.scale", "decoder.norm_out.weight", "decoder.GroupNorm_0.scale"),
    ("decoder.norm_out.bias", "decoder.norm_out.bias", "decoder.GroupNorm_0.bias"),
    ("decoder.conv_out.kernel", "decoder.conv_out.weight", "decoder.Conv_{last}.kernel"),
    ("decoder.conv_out.bias", "decoder.conv_out.bias", "decoder.Conv_{last}.bias"),
]

# within a residual block
BLOCK_TABLE = [
    ("norm_in.scale", "norm1.weight", "GroupNorm_0.scale"),
    ("norm_in.bias", "norm1.bias", "GroupNorm_0.bias"),
    ("conv_in.kernel", "conv1.weight", "Conv_0.kernel"),
    ("norm_out.scale", "norm2.weight", "GroupNorm_1.scale"),
    ("norm_out.bias", "norm2.bias", "GroupNorm_1.bias"),
    ("conv_out.kernel", "conv2.weight", "Conv_1.kernel"),
]
SHORTCUT = ("shortcut.kernel", "nin_shortcut.weight", "Conv_2.kernel")

# within a level of the decoder but the one with the highest resolution: the convolution on the
# way up, which PyTorch numbers by level and Flax by when it runs
UPSAMPLE_TABLE = [
    ("decoder.levels.{run}.upsample.kernel", "decoder.up.{level}.upsample.conv.weight",
     "decoder.Conv_{conv}.kernel"),
    ("decoder.levels.{run}.upsample.bias", "decoder.up.{level}.upsample.conv.bias",
     "decoder.Conv_{conv}.bias"),
]  # fmt: skip


def never_read(name: str) -> bool:
    """Whether a tensor belongs to the losses that taming-transformers' checkpoints keep, too."""
    return name.startswith("loss.")


def layout_of(weights: Weights) -> Layout:
    """Which of the two tables names these weights, by the codebook; a UserError if neither does."""
    layouts: list[Layout] = [layout for name, layout in _CODEBOOKS.items() if name in weights]
    if len(layouts) != 1:
        names = ", ".join(_CODEBOOKS)
        raise UserError(f"these are not a VQGAN's weights: {len(layouts)} of {names}, must be 1")
    return layouts[0]


def rules(cfg: VQGANConfig, layout: Layout) -> list[Rule]:
    """One rule per parameter of `VQGAN(cfg)`."""
    depth = len(cfg.channel_multipliers)
    rows = [tuple(name.format(last=depth) for name in row) for row in TABLE]
    for run, level in enumerate(range(depth - 1, 0, -1)):
        where = {"run": run, "level": level, "conv": run + 1}
        rows += [tuple(name.format(**where) for name in row) for row in UPSAMPLE_TABLE]
    for half, blocks in _blocks(cfg).items():
        for number, (ours, torch, widens) in enumerate(blocks):
            for row in [*BLOCK_TABLE, SHORTCUT] if widens else BLOCK_TABLE:
                block = zip((ours, torch, f"ResBlock_{number}"), row, strict=True)
                rows.append(tuple(f"{half}.{prefix}.{name}" for prefix, name in block))
    if layout == "flax":
        return [Rule(flax, ours) for ours, _, flax in rows]
    return [
        Rule(torch, ours, window_first) if ours.endswith(".kernel") else Rule(torch, ours)
        for ours, torch, _ in rows
    ]


def _blocks(cfg: VQGANConfig) -> dict[str, list[tuple[str, str, bool]]]:
    """Each half's residual blocks as they run: our path, PyTorch's, and whether the width changes.

    PyTorch numbers levels from the highest resolution down in both halves; we and Flax in the
    order in which they run.
    """
    widths, blocks = cfg.widths, range(cfg.num_res_blocks)
    last = len(widths) - 1
    middle = [(f"middle.{b}", f"mid.block_{b + 1}", False) for b in range(2)]
    down = [
        (f"levels.{n}.blocks.{b}", f"down.{n}.block.{b}", b == 0 and width != widths[max(n - 1, 0)])
        for n, width in enumerate(widths)
        for b in blocks
    ]
    up = [
        (f"levels.{last - n}.blocks.{b}", f"up.{n}.block.{b}", b == 0 and widths[n] != below)
        for n, below in reversed([*enumerate([*widths[1:], widths[last]])])
        for b in blocks
    ]
    return {"encoder": down + middle, "decoder": middle + up}


def sizes_from_weights(weights: Weights) -> VQGANConfig:
    """The config of the network that has these weights, with float32 activations.

    Weights do not tell the number of norm groups; published networks have the default's 32.

    Raises:
        UserError: weights of no VQGAN, or tensors that tell no size.
    """
    layout = layout_of(weights)
    codebook = next(np.shape(weights[name]) for name in _CODEBOOKS if name in weights)
    if layout == "torch":
        depth = count_names(r"encoder\.down\.(\d+)\.", weights)
        in_levels = count_names(r"encoder\.down\.(\d+\.block\.\d+)\.", weights)
    else:
        depth = count_names(r"decoder\.Conv_(\d+)\.", weights) - 1
        in_levels = count_names(r"encoder\.ResBlock_(\d+)\.", weights) - 2
    if len(codebook) != 2 or 0 in codebook or depth < 1 or in_levels < 1 or in_levels % depth:
        raise UserError(
            f"these are not a VQGAN's weights: codebook {codebook}, {depth} levels, and"
            f" {in_levels} residual blocks before the middle of the encoder"
        )
    cfg = VQGANConfig(
        channel_multipliers=(1,) * depth,
        num_res_blocks=in_levels // depth,
        latent_channels=codebook[1],
        codebook_size=codebook[0],
    )
    names = {rule.target: str(rule.source) for rule in rules(cfg, layout)}
    norms = [names[f"encoder.levels.{level}.blocks.0.norm_out.scale"] for level in range(depth)]
    widths = [np.size(weights.get(name, ())) for name in norms]
    if 0 in widths:
        raise UserError(f"these are not a VQGAN's weights: no vector {norms[widths.index(0)]}")
    channels = math.gcd(*widths)
    multipliers = tuple(width // channels for width in widths)
    return dataclasses.replace(cfg, channels=channels, channel_multipliers=multipliers)
