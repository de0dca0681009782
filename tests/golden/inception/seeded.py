"""Weights and images that the recordings beside it were made from.

RandomState is a frozen stream, the same on every numpy, so no 90 MB of weights are kept.
"""

import zlib

import numpy as np


def weight(name, shape):
    """A tensor of FID's InceptionV3 by its PyTorch name and shape."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    r = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    n = r.standard_normal(int(np.prod(shape))).reshape(shape)
    if name.endswith("conv.weight"):  # OIHW
        fan_in = shape[1] * shape[2] * shape[3]
        w = n * np.sqrt(2.0 / fan_in)
    elif name.endswith("bn.weight"):
        w = 1.0 + 0.1 * n
    elif name.endswith("bn.bias") or name.endswith("bn.running_mean"):
        w = 0.1 * n
    elif name.endswith("bn.running_var"):
        w = np.exp(0.2 * n)
    elif name == "fc.weight":
        w = n / np.sqrt(shape[1])
    elif name == "fc.bias":
        w = 0.1 * n
    else:
        raise KeyError(name)
    return w.astype(np.float32)


def images(n, size, seed):
    """(n,3,size,size) float32 in [0,1]: sums of a few random plane waves (smooth, non-trivial)."""
    r = np.random.RandomState(seed)
    y, x = np.meshgrid(np.arange(size) / size, np.arange(size) / size, indexing="ij")
    out = np.zeros((n, 3, size, size))
    for i in range(n):
        for c in range(3):
            a = np.zeros((size, size))
            for _ in range(6):
                f, p, w = r.uniform(-12, 12, 2), r.uniform(0, 2 * np.pi), r.uniform(0.3, 1.0)
                a += w * np.sin(2 * np.pi * (f[0] * x + f[1] * y) + p)
            out[i, c] = 0.5 + 0.5 * np.tanh(a)
    return out.astype(np.float32)
