"""VQGAN's FLOPs by formula, two per multiply-add: its convolutions and the codebook product."""

from enat_jax.tokenizers.vqgan import VQGANConfig


def encode_flops(cfg: VQGANConfig, side: int) -> float:
    """Token ids of one square image.

    Args:
        cfg: the network's sizes.
        side: pixels along each side, a multiple of `cfg.patch`.
    """
    widths = cfg.widths
    total = _conv(side, 3, 3, widths[0])
    for depth, width in enumerate(widths):
        finer = widths[max(depth - 1, 0)]
        total += _res_blocks(side // 2**depth, cfg.num_res_blocks, finer, width)
    grid, top = side // cfg.patch, widths[-1]
    total += _res_blocks(grid, 2, top, top) + _conv(grid, 1, top, cfg.latent_channels)
    return total + 2.0 * grid**2 * cfg.latent_channels * cfg.codebook_size


def decode_flops(cfg: VQGANConfig, side: int) -> float:
    """One square image of token ids; looking up the codebook costs nothing.

    Args:
        cfg: the network's sizes.
        side: pixels along each side, a multiple of `cfg.patch`.
    """
    widths = cfg.widths
    grid, top = side // cfg.patch, widths[-1]
    total = _conv(grid, 3, cfg.latent_channels, top) + _res_blocks(grid, 2, top, top)
    for depth, width in enumerate(widths):
        coarser = widths[min(depth + 1, len(widths) - 1)]
        total += _res_blocks(side // 2**depth, cfg.num_res_blocks, coarser, width)
        if depth:
            total += _conv(side // 2 ** (depth - 1), 3, width, width)
    return total + _conv(side, 3, widths[0], 3)


def _conv(side: int, size: int, channels_in: int, channels_out: int) -> float:
    return 2.0 * side**2 * size**2 * channels_in * channels_out


def _res_blocks(side: int, number: int, channels_in: int, channels_out: int) -> float:
    """Blocks in a row, of which the first may change the width."""
    shortcut = _conv(side, 1, channels_out, channels_out) if channels_in != channels_out else 0.0
    same = (2 * number - 1) * _conv(side, 3, channels_out, channels_out)
    return _conv(side, 3, channels_in, channels_out) + same + shortcut
