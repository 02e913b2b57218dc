"""Weights, pictures and labels by formula: the tests and make_goldens.py (which runs in the
reference's own environment) both make them here, so only the reference's answers have to be stored.
numpy only; RandomState's stream is frozen."""

import math
from zlib import crc32

import numpy as np

# The eight (arch, neck) pairs of the published table, and a small one that both sides can evaluate
# at every scale.
PAIRS = [
    ("vit_b16", "mln"),
    ("vit_b16", "ln_mln"),
    ("deit_s16", "none"),
    ("deit_s16", "mln"),
    ("deit_s16", "ln_mln"),
    ("deit_b16", "none"),
    ("deit_b16", "mln"),
    ("deit_b16", "ln_mln"),
]
SMALL = dict(
    width=96,
    depth=4,
    heads=3,
    patch=16,
    grid=32,
    channels=32,
    drop_path=0.0,
)
SIZES = [(512, 512), (300, 401), (97, 131)]


def weight(name, shape):
    """The value of the parameter or buffer with this name (in the reference's naming) as float32,
    about unit gain."""
    r = np.random.RandomState(crc32(name.encode()))
    u = r.random_sample(shape) - 0.5

    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return (1 + u).astype(np.float32)

    if len(shape) == 1:
        centre = 1 if name.endswith("weight") else 0
        return (centre + 0.4 * u).astype(np.float32)

    gain = 1.0
    if "token" not in name and "pos_embed" not in name:
        inputs = np.prod(shape[1:])
        gain = 1.4 / np.sqrt(inputs)
    return (gain * np.sqrt(12) * u).astype(np.float32)


def fill(state_dict):
    """{name: tensor or shape holder} -> {name: numpy array}, every entry by formula."""
    arrays = {}
    for name, value in state_dict.items():
        arrays[name] = weight(name, tuple(value.shape))
    return arrays


def image(height, width, batch=1, seed=0):
    """(batch, 3, height, width) float32, normalised: broad waves of colour and some noise."""
    r = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width] / 64.0

    out = np.empty((batch, 3, height, width))
    for b in range(batch):
        for c in range(3):
            fy, fx, phase = r.uniform(0.3, 2, 3)

            down = np.sin(fy * y + phase)
            across = np.cos(fx * x * (1 + b))
            noise = r.standard_normal((height, width))
            out[b, c] = down + across + 0.3 * noise

    return out.astype(np.float32)


def labels(height, width, batch=1, seed=0):
    """(batch, height, width) int64: blocks of classes 0..149, one block in nine ignored (255)."""
    r = np.random.RandomState(100 + seed)
    rows = math.ceil(height / 24)
    columns = math.ceil(width / 24)

    blocks = r.randint(0, 150, (batch, rows, columns))
    chance = r.random_sample(blocks.shape)
    blocks[chance < 1 / 9] = 255

    pixels = blocks.repeat(24, axis=1)
    pixels = pixels.repeat(24, axis=2)
    return pixels[:, :height, :width]


def picture(height=90, width=128, seed=0):
    """(height, width, 3) uint8: every kind of colour, smooth in one half and noise in the other.
    128 wide as cv2 rounds the pixels at the end of a row that do not fill a vector (of up to 64),
    where it truncates all others."""
    r = np.random.RandomState(seed)
    noise = r.randint(0, 256, (height, width, 3))
    y, x = np.mgrid[0:height, 0:width]

    red = x * 255 // (width - 1)
    green = y * 255 // (height - 1)
    blue = (x + y) * 255 // (height + width - 2)
    smooth = np.stack([red, green, blue], axis=2)

    in_noise = x < width // 2
    in_noise = in_noise[:, :, None]  # alike for all three colours
    mixed = np.where(in_noise, noise, smooth)
    return mixed.astype(np.uint8)


def samples(array, count=256):
    """`count` values spread evenly over a flattened array."""
    flat = np.asarray(array).reshape(-1)
    places = np.linspace(0, flat.size - 1, count)
    return flat[places.astype(int)]
