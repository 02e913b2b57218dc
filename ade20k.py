"""The data: ADE20K's 150 classes, reading pictures and labels, the training and test transforms,
and the order of samples.

    jpg, png --load--> image (H, W, 3) uint8 RGB, label (H, W) uint8: 0 -> 255 (ignored), k -> k - 1
      --train_transform(rng)--> (3, S, S), (S, S), size before padding --loader--> batch --normalise--> the model

Data set: ADE20K scene parsing (Zhou et al. 2017, CVPR; Zhou et al. 2019, IJCV), the 2016
challenge's layout:

    ROOT/images/{training,validation}/NAME.jpg      ROOT/annotations/{training,validation}/NAME.png (0 = not labelled)
    ROOT/classes.txt, for data sets with other classes: see read_classes

As a program:  python ade20k.py {download,toy,check} DIR
"""

import argparse
import colorsys
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import Pool
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy.ndimage import gaussian_filter, map_coordinates, maximum_filter, minimum_filter
from torch import Tensor

from upernet import IGNORE_INDEX

DEFAULT_ROOT = "data/ade/ADEChallengeData2016"
MEAN = torch.tensor(
    [123.675, 116.28, 103.53]
)  # of ImageNet, RGB; the reference uses them for ViT-B too, although
STD = torch.tensor([58.395, 57.12, 57.375])  # its weights were pretrained with 127.5 / 127.5
# Names and colours of the challenge (objectInfo150, color150), the names as the reference prints
# them.
CLASSES = tuple("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence,
desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island,
computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight,
booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent,
bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board,
shower, radiator, glass, clock, flag""".strip().replace("\n", " ").split(", "))
PALETTE = np.frombuffer(
    bytes.fromhex("""
787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307cc46030066c8
3de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14
ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5
003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014
ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa
8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff
ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cffb8ff000085ffffd600
19c2c266ff005c00ff
"""),
    np.uint8,
).reshape(150, 3)


class DataError(Exception):
    """A fault in the data, in one sentence: the file, the value, the way out."""


class Classes(NamedTuple):
    """What the labels of a data set mean. In its files 0 is "not labelled" and k class k - 1
    (zero_ignored, as in ADE20K), or k is class k and 255 "not labelled"."""

    names: tuple[str, ...] = CLASSES
    palette: list[list[int]] = PALETTE.tolist()  # [R, G, B] of each, 0..255
    zero_ignored: bool = True


def read_classes(root: str) -> Classes:
    """Those of ROOT/classes.txt: one name a line, `R G B` behind it or none; a first line `ignore
    0` sets zero_ignored. Without that file ADE20K's. DataError with the line that cannot be
    used."""
    path, names, palette = os.path.join(root, "classes.txt"), [], []
    if not os.path.exists(path):
        return Classes()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [(n, line.strip()) for n, line in enumerate(file, start=1) if line.strip()]
    zero_ignored = bool(lines) and lines[0][1].split() == ["ignore", "0"]
    for n, line in lines[zero_ignored:]:
        name, *rgb = re.fullmatch(r"(.*?\S)(?:\s+(\d+)\s+(\d+)\s+(\d+))?", line).groups()
        # Without a colour, hues in steps of the golden section are far apart however many there
        # are; three brightnesses.
        free = colorsys.hsv_to_rgb(len(names) * 0.618 % 1, 0.9, 1 - len(names) % 3 / 4)
        palette.append([round(255 * x) for x in free] if rgb[0] is None else [int(x) for x in rgb])
        if name in names or max(palette[-1]) > 255:
            raise DataError(
                f"{path}, line {n}: {line!r} has a colour above 255 or a name that another line has"
            )
        names.append(name)
    if not 0 < len(names) < 256:
        raise DataError(
            f"{path}: {len(names)} classes, it must be 1 to 255 (8 bits, and one value for unlabelled pixels)"
        )
    return Classes(tuple(names), palette, zero_ignored)


# ---- reading -------------------------------------------------------------------------------------


def load_image(path: str) -> np.ndarray:
    """Any picture Pillow can read -> (H, W, 3) uint8 RGB, upright. DataError if it cannot be read.

    Grey is repeated, alpha dropped, 16 bits are cut to the upper 8, EXIF rotation is applied: as
    cv2.imread does it."""
    try:
        with Image.open(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            if picture.mode.startswith(
                "I"
            ):  # 16 bits grey; Pillow's own conversion would clip instead of scaling
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise a dozen different types on damaged files
        raise DataError(
            f"{path}: cannot be read as a picture ({error}), replace the file"
        ) from error


def load_label(path: str, classes: Classes = Classes()) -> np.ndarray:
    """A label file (8 bits, grey or palette png) -> (H, W) uint8, 0..C-1, or 255 where nobody
    labelled. DataError if it is none or holds a value that is no class."""
    try:
        with Image.open(path) as file:
            label = np.asarray(file)  # of a palette file, the indices
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read as a label file ({error}), replace the file"
        ) from error
    if label.ndim != 2 or label.dtype != np.uint8:
        raise DataError(
            f"{path}: labels must be one channel of 8 bits, this is {label.dtype} of shape {label.shape}"
        )
    label = label - np.uint8(classes.zero_ignored)  # 0 -> 255, as uint8 wraps, and k -> k - 1
    wrong = label[(label >= len(classes.names)) & (label != IGNORE_INDEX)]
    if len(wrong):
        raise DataError(
            f"{path}: label {wrong.max() + classes.zero_ignored} is above the {len(classes.names)} classes, "
            f"{0 if classes.zero_ignored else IGNORE_INDEX} is for unlabelled pixels"
        )
    return label


def load(
    image_path: str, label_path: str, classes: Classes = Classes()
) -> tuple[np.ndarray, np.ndarray]:
    """load_image and load_label of one sample; DataError if their sizes differ."""
    image, label = load_image(image_path), load_label(label_path, classes)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"{image_path}: the picture has {image.shape[0]}x{image.shape[1]} pixels, its label file "
            f"{label_path} {label.shape[0]}x{label.shape[1]}, they must be equal"
        )
    return image, label


def hint_at_root(root: str) -> None:
    """DataError if the folder root is too high above a data set or too deep in it, or the other
    release of ADE20K."""
    if not os.path.isdir(root):
        return
    if os.path.isdir(os.path.join(root, "images", "ADE")) or os.path.exists(
        os.path.join(root, "index_ade20k.pkl")
    ):
        raise DataError(
            f"{root}: this is the full ADE20K release of 2021, with other labels than the challenge set of 2016 "
            "that the recipes use; `python ade20k.py download data/ade` fetches that one (1 GB)"
        )
    near = sorted(os.listdir(root)) + ["..", "../.."]
    for folder in (os.path.normpath(os.path.join(root, name)) for name in near):
        if all(
            os.path.isdir(os.path.join(folder, name, "training"))
            for name in ("images", "annotations")
        ):
            raise DataError(
                f"{root}: holds no data set itself, but {folder} does: use --data {folder}"
            )


def scan(root: str, split: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (image, label) paths of ROOT/images/SPLIT and ROOT/annotations/SPLIT, sorted by name, and
    the faults found."""
    folders = os.path.join(root, "images", split), os.path.join(root, "annotations", split)
    names = []  # two dictionaries: stem -> file name
    for folder, suffixes in zip(folders, ((".jpg", ".jpeg", ".png"), (".png",))):
        if not os.path.isdir(folder):
            hint_at_root(root)
            raise DataError(
                f"{folder}: no such folder; `python ade20k.py download data/ade` fetches ADE20K (1 GB), "
                "--data DIR names another data set, --data toy draws a small one"
            )
        files = sorted(f for f in os.listdir(folder) if f.lower().endswith(suffixes))
        names.append({os.path.splitext(f)[0]: f for f in files})
    faults = [
        f"{os.path.join(folders[0], names[0][stem])}: its label file {os.path.join(folders[1], stem)}.png is missing"
        for stem in names[0]
        if stem not in names[1]
    ]
    faults += [
        f"{os.path.join(folders[1], names[1][stem])}: its picture in {folders[0]} is missing"
        for stem in names[1]
        if stem not in names[0]
    ]
    return [
        tuple(os.path.join(folders[i], names[i][stem]) for i in (0, 1))
        for stem in names[0]
        if stem in names[1]
    ], faults


def header_fault(pair: tuple[str, str]) -> str | None:
    """What the first bytes of the two files tell: unreadable, or of different sizes (turned by EXIF
    or not)."""
    sizes = []
    for path in pair:
        try:
            with Image.open(path) as file:
                sizes.append(file.size)
        except Exception as error:
            return f"{path}: cannot be read ({error}), replace the file"
    if sorted(sizes[0]) != sorted(sizes[1]):
        return f"{pair[0]}: the picture is {sizes[0][0]}x{sizes[0][1]}, its label file {pair[1]} {sizes[1][0]}x{sizes[1][1]}"


def find_pairs(root: str, split: str, optional: bool = False) -> list[tuple[str, str]]:
    """scan, and a look at every file's header; DataError with the first faults if there are any, or
    no pictures."""
    if optional and not os.path.isdir(os.path.join(root, "images", split)):
        return []
    pairs, faults = scan(root, split)
    with ThreadPoolExecutor(16) as threads:  # threads: waiting for a (network) disk, not computing
        faults += [fault for fault in threads.map(header_fault, pairs) if fault]
    if faults:
        raise DataError(
            f"{faults[0]}"
            + (f"; and {len(faults) - 1} faults more" if faults[1:] else "")
            + f"; `python ade20k.py check {root}` lists all"
        )
    if not pairs:
        raise DataError(f"{os.path.join(root, 'images', split)}: holds no .jpg or .png pictures")
    return pairs


# ---- transforms ----------------------------------------------------------------------------------


def scaled_size(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The largest (h, w) of the same aspect with long side <= long, short side <= short, as
    mmcv.rescale_size; at least 1."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def taps(first: int, last: int, old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For target pixels first..last of an axis resized from old to new: the two source pixels on
    either side of each one's centre, (i + 1/2) old / new, and the weight of the second."""
    x = (np.arange(first, last) + 0.5) * old / new - 0.5
    left = np.floor(x).astype(np.intp)
    return left.clip(0, old - 1), (left + 1).clip(0, old - 1), (x - left).astype(np.float32)


def resize_bilinear(
    image: np.ndarray, h: int, w: int, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """What cv2.resize(image, (w, h))[y0:y1, x0:x1] gives, within one grey level, computing only box
    = (y0, x0, y1, x1).

    image (H, W, 3) uint8 -> (3, y1 - y0, x1 - x0) uint8. No antialiasing when shrinking: Pillow's
    filters, which do, would feed the network smoother pictures than the published runs saw."""
    H, W = image.shape[:2]
    y0, x0, y1, x1 = box or (0, 0, h, w)
    if (h, w) == (H, W):
        return image[y0:y1, x0:x1].transpose(2, 0, 1)
    (top, bottom, v), (left, right, u) = taps(y0, y1, H, h), taps(x0, x1, W, w)
    a, b, c, d = (
        top[0],
        bottom[-1] + 1,
        left[0],
        right[-1] + 1,
    )  # only these source rows and columns are touched
    x = image[a:b, c:d].transpose(2, 0, 1).astype(np.float32, order="C")  # (3, b - a, d - c)
    # take(..., "clip") is x[:, :, left - c] without a check; and new memory costs more than
    # arithmetic, so in place:
    x = blend(
        x.take(left - c, 2, mode="clip"), x.take(right - c, 2, mode="clip"), u
    )  # (3, b - a, x1 - x0)
    x = blend(x[:, top - a], x[:, bottom - a], v[:, None])  # (3, y1 - y0, x1 - x0)
    x += 0.5
    return x.astype(np.uint8)


def blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """first + (second - first) * weight, in second's place."""
    second -= first
    second *= weight
    second += first
    return second


def nearest_indices(old: int, new: int) -> np.ndarray:
    """The source index of each of `new` pixels, as cv2's INTER_NEAREST: floor(i * old / new), not
    the pixel's centre."""
    return np.minimum((np.arange(new) * (1 / (new / old))).astype(np.int64), old - 1)


# HSV as cv2 has it for uint8: hue 0..179 (2 degrees a step), saturation and value 0..255, all
# rounded. The rounding is part of the recipe: hue and saturation distortion see the picture through
# it. cv2 divides by table, in 20.12 fixed point.
_HUE = np.rint(np.append(0, (180 << 12) / (6 * np.arange(1.0, 256)))).astype(np.int32)
_SAT = np.rint(np.append(0, (255 << 12) / np.arange(1.0, 256))).astype(np.int32)
# Back to RGB: channel = value * (1 - saturation * fade(hue)); fade is 0 over the two of six sectors
# where the channel dominates (R around hue 0, G around 60, B around 120), 1 opposite, a ramp
# between. Smith 1978, "Color gamut transform pairs"; in float32 as cv2's vector code computes it,
# so that the truncation at the end meets the same numbers.
_SECTOR, _RAMP = np.divmod(np.arange(180, dtype=np.float32) * np.float32(6 / 180), np.float32(1))
_FADE = [
    np.choose((_SECTOR.astype(int) - peak) % 6, [0, _RAMP, 1, 1, 1 - _RAMP, 0]).astype(np.float64)
    for peak in (0, 2, 4)
]


def rgb_to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(3, H, W) uint8 -> hue (H, W) 0..179, saturation 0..255, value 0..255, integers, equal to
    cv2's. (hue: an index)"""
    r, g, b = image.astype(np.int16)
    value = np.maximum(np.maximum(r, g), b)
    spread = value - np.minimum(np.minimum(r, g), b)
    hue = np.where(value == r, g - b, np.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    saturation, hue = spread * _SAT.take(value, mode="clip"), hue * _HUE.take(spread, mode="clip")
    for x in (saturation, hue):
        x += 1 << 11  # rounds what the shift cuts
        x >>= 12
    hue += (hue >> 31) & 180  # where it is negative
    return hue.astype(np.intp), saturation, value


def hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of rgb_to_hsv, truncated, equal to what cv2 computes in vectors (ends of rows it
    rounds). -> uint8"""
    unit = np.float32(1 / 255)
    value, saturation = value.astype(np.float32) * unit, np.float64(
        saturation.astype(np.float32) * unit
    )
    image = np.empty((3, *hue.shape), np.uint8)
    for channel, fade in zip(
        image, _FADE
    ):  # float64 inside the bracket, rounded once: cv2 uses a fused multiply-add there
        x = fade.take(hue, mode="clip")
        x *= saturation
        x = np.subtract(1, x, out=x).astype(np.float32)
        x *= value
        channel[:] = np.multiply(x, np.float32(255), out=x)
    return image


def scale_levels(x: np.ndarray, factor: float = 1, offset: float = 0) -> np.ndarray:
    """x * factor + offset, clipped to 0..255 and truncated, uint8."""
    return np.clip(x.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of (3, H, W) uint8 (SSD, Liu et al. 2016, arXiv:1512.02325, section
    2.2), each step with probability 1/2."""
    if rng.integers(0, 2):
        image = scale_levels(image, offset=rng.uniform(-32, 32))  # brightness
    contrast_first = rng.integers(0, 2)
    if contrast_first and rng.integers(0, 2):
        image = scale_levels(image, factor=rng.uniform(0.5, 1.5))
    if rng.integers(0, 2):
        hue, saturation, value = rgb_to_hsv(image)
        image = hsv_to_rgb(hue, scale_levels(saturation, factor=rng.uniform(0.5, 1.5)), value)
    if rng.integers(0, 2):
        hue, saturation, value = rgb_to_hsv(image)
        turned = (
            np.arange(180) + rng.integers(-18, 18)
        ) % 180  # a table: `%` on whole pictures is slow
        image = hsv_to_rgb(turned.take(hue, mode="clip"), saturation, value)
    if not contrast_first and rng.integers(0, 2):
        image = scale_levels(image, factor=rng.uniform(0.5, 1.5))
    return image


def train_transform(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    crop: int = 512,
    short: int = 512,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The reference's training pipeline up to normalisation: scale, crop, flip, distort, pad.

    image (H, W, 3) uint8, label (H, W) uint8 -> (3, crop, crop) uint8, (crop, crop) uint8, (h, w)
    before padding. Scale: into (4 short, short) * U(0.5, 2). The crop is redrawn up to ten times
    while one class fills 75% or more of its labelled pixels. Padding, on the right and below, is
    255 in the label. In the image it is 0 *after* normalisation, which no uint8 can say:
    normalise(images, sizes) does it. Random numbers are drawn in the reference's order, so that a
    test can replay its stream."""
    ratio = rng.random() * 1.5 + 0.5
    h, w = scaled_size(*label.shape, int(4 * short * ratio), int(short * ratio))
    rows, columns = nearest_indices(label.shape[0], h), nearest_indices(label.shape[1], w)
    for attempt in range(11):  # the eleventh is taken as it comes
        y0, x0 = rng.integers(0, max(h - crop, 0) + 1), rng.integers(0, max(w - crop, 0) + 1)
        y1, x1 = min(y0 + crop, h), min(x0 + crop, w)
        cropped = label[rows[y0:y1]][:, columns[x0:x1]]
        counts = np.array(Image.fromarray(cropped).histogram()[:IGNORE_INDEX])
        if attempt == 10 or np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image, label = resize_bilinear(image, h, w, (y0, x0, y1, x1)), cropped
    if rng.random() < 0.5:
        image, label = image[:, :, ::-1], label[:, ::-1]
    image = distort(image, rng)
    pad = ((0, crop - label.shape[0]), (0, crop - label.shape[1]))
    return np.pad(image, ((0, 0), *pad)), np.pad(label, pad, constant_values=IGNORE_INDEX), label.shape


def normalise(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 -> (x - mean) / std, float32, on the images' device; 0 outside each
    picture's (h, w) in sizes (B, 2), where the picture was padded."""
    x = (images.float() - MEAN.to(images.device)[:, None, None]) / STD.to(images.device)[
        :, None, None
    ]
    if sizes is not None:
        inside_y = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # (B, H)
        inside_x = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]  # (B, W)
        x = x * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
    return x


# ---- samples -------------------------------------------------------------------------------------


class TrainSet(torch.utils.data.Dataset):
    """Sample number `position` of the run: which picture, and how it is cut and distorted, follow
    from (seed, position) alone. So neither the number of workers nor of processes changes a run,
    and one resumed at iteration i goes on with the samples it would have seen, at once."""

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        seed: int,
        crop: int = 512,
        short: int = 512,
        classes: Classes = Classes(),
    ):
        self.pairs, self.seed, self.crop, self.short, self.classes = (
            pairs,
            seed,
            crop,
            short,
            classes,
        )

    def paths(self, position: int) -> tuple[str, str]:
        epoch, i = divmod(
            position, len(self.pairs)
        )  # every pass over the data has an order of its own
        return self.pairs[
            np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.pairs))[i]
        ]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> image (3, S, S) uint8, label (S, S) uint8, size (2,) before padding"""
        image, label = load(*self.paths(position), self.classes)
        rng = np.random.default_rng([self.seed, position, 1])
        image, label, size = train_transform(image, label, rng, self.crop, self.short)
        return torch.from_numpy(image), torch.from_numpy(label), torch.tensor(size)


def positions(
    start: int, iters: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """Of each iteration's batch, positions [i * batch, (i + 1) * batch), the share of one
    process."""
    share = batch // world
    for first in range(start * batch + rank * share, iters * batch, batch):
        yield list(range(first, first + share))


def load_pair(
    pair: tuple[str, str | None], classes: Classes
) -> tuple[str, np.ndarray, np.ndarray | None]:
    """(image path, label path or None) -> image path, picture and label (or None) at their own
    size."""
    return pair[0], *(load(*pair, classes) if pair[1] else (load_image(pair[0]), None))


# ---- the toy data set ----------------------------------------------------------------------------
# Outdoor scenes drawn by code, to try everything before the real download. Sky and flat ground are computed pixel by
# pixel; things, made of flat polygons in a 3-D world, are then drawn from far to near, picture and label alike.

HEIGHT, WIDTH, FOCAL = 192, 256, 220  # in pixels
VALUES = dict(
    building=2,
    sky=3,
    tree=5,
    fir=5,
    road=7,
    grass=10,
    sidewalk=12,
    person=13,
    mountain=17,
    car=21,
    sea=27,
    house=26,
    sand=47,
    flower=67,
    boat=77,
)  # class index + 1, as in ADE20K's files; other things get 0
LIGHTS = [
    (
        (1.06, 1.03, 0.97),
        (66, 128, 205),
        (186, 216, 236),
        0.5,
    ),  # noon: sunlight, sky above, haze, shadow
    ((1.14, 0.93, 0.70), (94, 124, 184), (255, 208, 150), 0.55),  # golden evening
    ((0.86, 0.90, 0.94), (140, 153, 168), (206, 212, 216), 0.25),
]  # overcast
BRIGHT = [
    (206, 62, 54),
    (240, 184, 60),
    (52, 104, 176),
    (238, 236, 228),
    (224, 112, 158),
    (60, 150, 140),
]
DARK, GLASS, CREAM, SNOW, WOOD = (
    (36, 38, 46),
    (84, 112, 134),
    (236, 228, 212),
    (246, 248, 252),
    (104, 74, 54),
)
SHADE, LEAF, GRASS, SEA, SAND = (
    (50, 90, 48),
    (74, 120, 56),
    (112, 148, 66),
    (44, 116, 138),
    (228, 202, 148),
)
ROAD, PAVING, WALL, ROCK, RED = (
    (84, 86, 92),
    (178, 172, 172),
    (190, 156, 138),
    (88, 94, 122),
    (172, 70, 52),
)


def ring(n, x, y, rx, ry):
    """Corners of a box (n = 4) or of a rounder shape around x, y; of several such shapes where
    these are lists."""
    turn, (x, y, rx, ry) = (np.arange(n) + 0.5) * 2 * np.pi / n, (
        np.reshape(v, (-1, 1)) for v in (x, y, rx, ry)
    )
    return x + rx * np.sin(turn) / np.cos(np.pi / n), y - ry * np.cos(turn) / np.cos(np.pi / n)


# parts from back to front: colour (None: a bright one by chance), the corners' x, y (and z) in
# metres
THINGS = dict(
    tree=[
        (WOOD, [-0.2, 0.2, 0.1, -0.1], [0, 0, 3, 3]),
        (SHADE, *ring(10, [0.3, 0], [2.9, 3.8], 1.5, 1.2)),
        (LEAF, *ring(10, [-0.5, -0.2], [3.1, 4.1], 1, 0.8)),
        (GRASS, *ring(10, -0.6, 3.8, 0.6, 0.6)),
    ],
    fir=[
        (SHADE, *ring(3, 0, [0.8, 2, 3.2], [0.9, 0.7, 0.5], 0.8)),
        (LEAF, [-1.2, -0.3, 0], [0.1, 0, 4.6]),
    ],
    flower=[
        (SHADE, *ring(9, 0, 0.28, 0.9, 0.45)),
        (
            None,
            *ring(
                6,
                [-0.55, 0.55, 0, -0.25, 0.25, 0.1],
                [0.36, 0.3, 0.56, 0.22, 0.1, 0.33],
                0.22,
                0.17,
            ),
        ),
    ],
    car=[
        (DARK, *ring(4, [-0.6, 0.6], 0.25, 0.2, 0.25)),
        (None, [-1, 1, 1, 0.7, -0.7, -1], [0.3, 0.3, 0.9, 1.5, 1.5, 0.9]),
        (GLASS, [-0.75, 0.75, 0.55, -0.55], [0.95, 0.95, 1.4, 1.4]),
        (RED, *ring(4, [-0.75, 0.75], 0.75, 0.15, 0.1)),
    ],
    person=[
        (DARK, *ring(4, [-0.16, 0.16], 0.6, 0.14, 0.6)),
        (None, [-0.48, 0.48, 0.36, -0.36], [1, 1, 1.85, 1.85]),
        ((226, 178, 146), *ring(8, 0, 2.06, 0.21, 0.22)),
        (WOOD, *ring(4, 0, 2.24, 0.21, 0.09)),
    ],
    house=[
        (CREAM, [-5, -2, -2, -3.5, -5], [0, 0, 2.8, 4.8, 2.8]),
        (PAVING, *ring(4, 1.5, 1.4, 3.5, 1.4)),
        (RED, [-3.6, 3.5, 5.4, -1.9], [4.9, 4.9, 2.6, 2.6]),
        (GLASS, *ring(4, [-3.5, -0.4, 2, 4], 1.5, 0.5, 0.5)),
    ],
    boat=[
        (WOOD, *ring(4, 0, 3.5, 0.1, 3.5)),
        (CREAM, [-0.2, -0.2, -2.6], [1.2, 6.8, 1.2]),
        (None, [0.2, 0.2, 2.2], [1.4, 6.2, 1.4]),
        (RED, [-2.6, 2.4, 3.2, -3], [0, 0, 1, 1]),
    ],
    building=[
        (WALL, [0, 30, 30, 0], [0, 0, 10, 10], -12),
        (WALL, 0, [0, 0, 10, 10], [-12, 0, 0, -12]),
        (GLASS, 0, *ring(4, *np.mgrid[2:9:2.4, -11:0:1.9].reshape(2, -1), 0.7, 0.5)),
    ],
    mountain=[
        ((128, 134, 156), [-110, 90, 0, -22, -50, -82], [0, 0, 110, 93, 55, 33]),
        (ROCK, [20, 110, 33, 0, 10], [0, 0, 68, 110, 60]),
        (SNOW, [0, -22, -9, 2, 24], [110, 93, 80, 88, 80]),
    ],
    grass=[(GRASS, *ring(16, 0, 0, 70, 11))],
    lamp=[(DARK, *ring(4, [0, -0.4], [2.4, 4.8], [0.1, 0.6], [2.4, 0.1]))],
    parasol=[
        (WOOD, *ring(4, 0, 1.1, 0.06, 1.1)),
        (None, [-1.5, 1.5, 0.8, 0, -0.8], [1.8, 1.8, 2.4, 2.6, 2.4]),
    ],
    balloon=[
        (WOOD, *ring(4, 0, 12.7, 0.7, 0.6)),
        (None, [-0.7, 0.7, 3, 2.5, 0, -2.5, -3], [14, 14, 17, 20, 21, 20, 17]),
    ],
)
# eye height; the line x(z) of a road or shore, as a polynomial; strips of ground along it (class,
# colour,
SCENES = [
    # x from, to, texture: width, depth, strength); -1: on both sides; things (count, x from, to,
    # distance from, to)
    (
        3.2,
        [0.9],
        [
            ("sidewalk", PAVING, -9e9, 9e9, 0.5, 0.5, 0.05),
            ("sidewalk", CREAM, -3.7, 3.7),
            ("road", ROAD, -3.4, 3.4, 0.06, 0.1, 0.05),
            ("road", CREAM, -0.07, 0.07),
        ],
        -1,
        dict(
            mountain=(3, -250, 250, 500, 600),
            building=(10, 6.8, 7, 16, 90),
            tree=(6, 4.6, 5, 10, 50),
            car=(5, 1.5, 2, 9, 40),
            person=(6, 4.3, 6, 9, 22),
            lamp=(4, 4, 4, 9, 40),
        ),
    ),
    (
        5,
        [0.0004, -0.038, 1.15, -12],
        [
            ("sea", SEA, -9e9, 9e9, 1.2, 0.35, 0.07),
            ("sea", CREAM, -0.8, 99, 0.5, 0.3, 0.1),
            ("sand", SAND, 0.2, 99),
            ("sand", SAND, 1.5, 99, 0.1, 0.2, 0.04),
            ("grass", GRASS, 9, 9e9, 0.04, 0.1, 0.08),
        ],
        1,
        dict(
            mountain=(3, -300, 100, 450, 600),
            boat=(4, -30, -8, 24, 70),
            house=(2, 13, 20, 24, 50),
            person=(4, 2, 7, 12, 25),
            tree=(4, 10, 24, 18, 60),
            parasol=(2, 3, 7, 14, 25),
            flower=(9, 9, 13, 12, 25),
        ),
    ),
    (
        4,
        [0.0008, -0.076, 2, -13.2],
        [
            ("grass", GRASS, -9e9, 9e9, 0.04, 0.1, 0.08),
            ("road", ROAD, -2.5, 2.5, 0.06, 0.1, 0.05),
            ("road", CREAM, -0.07, 0.07),
        ],
        -1,
        dict(
            mountain=(4, -300, 300, 500, 600),
            grass=(4, -99, 99, 120, 200),
            house=(3, 9, 20, 22, 60),
            car=(2, 1, 1, 9, 30),
            tree=(6, 5, 30, 14, 90),
            fir=(6, 5, 30, 14, 90),
            flower=(14, 3, 8, 9, 18),
            balloon=(1, -20, 20, 50, 80),
        ),
    ),
]


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One toy scene: a picture (192, 256, 3) uint8 RGB and its label (192, 256) uint8 as ADE20K's
    files have it."""
    eye, curve, strips, sides, things = SCENES[rng.integers(3)]
    sun, top, haze, dark = (np.float32(v).reshape(-1, 1, 1) for v in LIGHTS[rng.integers(3)])
    (sun_side, flip), horizon = rng.choice([-1, 1], 2).tolist(), int(rng.integers(72, 88))
    noise = sum(
        2 * s * gaussian_filter(rng.standard_normal((256, 256), np.float32), s, mode="wrap")
        for s in (1, 3)
    )
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) + 0.5
    depth = (
        FOCAL * eye / (y[horizon:] - horizon)
    )  # the place on the ground that each pixel shows, in metres
    across = (x[horizon:] - WIDTH / 2) * depth / FOCAL
    curve = np.float32(curve) * rng.uniform(0.6, 1.15)  # float32 throughout, for speed
    beside = flip * across - np.polyval(curve, depth.clip(0, 60))  # metres from the road or shore
    pixel = np.hypot(
        *np.gradient(beside)
    )  # and its change from one pixel to the next, for smooth edges

    def texture(
        dx, dz, strength
    ):  # noise in patches of dx by dz metres; fades where they are smaller than a pixel
        patches = map_coordinates(noise, (depth / dz, across / dx), order=1, mode="grid-wrap")
        return strength * patches * (3 * FOCAL * eye * dz / depth**2).clip(0, 1)

    image = (
        top + (haze - top) * (y / horizon).clip(0, 1) ** 1.3
    )  # colours come first: (3, HEIGHT, WIDTH)
    away = np.hypot(x - WIDTH * (0.5 + 0.42 * sun_side), y - horizon * 0.4)
    image += (np.exp(-away / 30) + np.exp(-((away / 7) ** 4))) * sun * 180 * dark
    sky, land = image[:, :horizon], image[:, horizon:]  # views: painting on them paints the image
    puffs = texture(eye * 0.2, eye * 0.25, 1)[horizon - 1 :: -1] + rng.uniform(
        -0.8, 0.2
    )  # clouds mirror the ground
    sky += (puffs * 0.8).clip(0, 0.85) * (0.35 * haze + 165 - 8 * puffs - sky)
    label = np.full((HEIGHT, WIDTH), VALUES["sky"], np.uint8)
    for (
        name,
        colour,
        left,
        right,
        *grain,
    ) in strips:  # wet sand and painted lines have no grain, and are darker
        cover = (np.minimum(beside - left, right - beside) / pixel + 0.5).clip(0, 1)
        fill = np.float32(colour).reshape(3, 1, 1) * sun * (1 + texture(*grain) if grain else 0.85)
        land += cover * (haze + (fill - haze) * np.exp(-depth / 450) - land)
        label[horizon:][cover >= 0.5] = VALUES[name]
    spots = sorted(
        [
            (z0 * (z1 / z0) ** ((i + rng.random()) / count), sides**i * rng.uniform(x0, x1), name)
            for name, (count, x0, x1, z0, z1) in things.items()
            for i in range(count)
        ],
        reverse=True,
    )
    spots = [(z, flip * (x + float(np.polyval(curve, min(z, 60)))), name) for z, x, name in spots]
    for (
        z,
        x,
        name,
    ) in spots:  # all the soft shadows first: they lie on the ground, under every thing
        r = float(np.abs(THINGS[name][-1][1]).max()) + 0.3
        land *= 1 - dark * np.exp(-((across - x + sun_side * r / 2) ** 2 + (depth - z) ** 2) / r**2)
    big = [
        Image.fromarray(v.repeat(3, 0).repeat(3, 1))
        for v in (label, np.uint8(np.dstack(image).clip(0, 255)))
    ]
    label_pen, image_pen = map(ImageDraw.Draw, big)
    for z, x, name in spots:
        wide, tall, side = *rng.uniform(0.85, 1.15, 2), (
            np.sign(x) if name == "building" else -sun_side
        )  # x mirrored
        tint = (
            sun
            * rng.uniform(0.88, 1.1)
            * rng.uniform(0.94, 1.06, (3, 1, 1))
            * (1 - 0.5 * dark * (side == sun_side))
        )
        for colour, *corners in THINGS[name]:
            dx, dy, dz = np.broadcast_arrays(
                *np.atleast_2d(*corners, 0)[:3]
            )  # most parts have no z: 0
            column = WIDTH / 2 + FOCAL * (x + side * wide * dx) / (z + dz)
            row = horizon + FOCAL * (eye - tall * dy) / (z + dz)
            fill = haze + (
                np.reshape(colour or BRIGHT[rng.integers(6)], (3, 1, 1)) * tint - haze
            ) * np.exp(-z / 450)
            for polygon in 3 * np.stack([column, row], -1).reshape(len(dx), -1):
                label_pen.polygon(polygon.tolist(), VALUES.get(name, 0))
                image_pen.polygon(polygon.tolist(), tuple(fill.clip(0, 255).astype(int).ravel()))
    label = np.array(big[0])[
        1::3, 1::3
    ].copy()  # of 3 x 3 the label takes the middle, the picture the mean
    rough = (
        np.float32(0.025 * (label != VALUES["sky"]) + 0.06 * (label == VALUES["tree"]))
        * noise[:HEIGHT]
    )
    image = big[1].reduce(3) * (1 + rough[..., None]) + 4 * rng.standard_normal(
        (HEIGHT, WIDTH, 3), np.float32
    )
    # Annotators leave thin gaps here and there where two classes meet.
    label[(maximum_filter(label, 2) > minimum_filter(label, 2)) & (noise[:HEIGHT] > 0.8)] = 0
    return image.clip(0, 255).astype(np.uint8), label


def make_toy(root: str) -> str:
    """Draw the toy data set, 96 training and 24 validation pictures in ADE20K's layout, in root; if
    it is there, leave it."""
    if os.path.isdir(root):
        return root
    # moved into place when whole: nobody reads half of it
    part = f"{os.path.normpath(root)}.part{os.getpid()}"
    for s, (split, count) in enumerate((("training", 96), ("validation", 24))):
        folders = os.path.join(part, "images", split), os.path.join(part, "annotations", split)
        for folder in folders:
            os.makedirs(folder)
        for i in range(count):
            image, label = draw_scene(np.random.default_rng([s, i]))
            Image.fromarray(image).save(os.path.join(folders[0], f"toy_{i:03d}.jpg"), quality=95)
            Image.fromarray(label).save(os.path.join(folders[1], f"toy_{i:03d}.png"))
    try:
        os.rename(part, root)
    except OSError:  # another process was faster, with the same pictures
        shutil.rmtree(part)
    return root


def data_root(name: str) -> str:
    """The folder that --data means: `toy` is drawn where it is missing, everything else is a
    path."""
    return make_toy("data/toy") if name == "toy" else name


# ---- python ade20k.py ----------------------------------------------------------------------------

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"  # as it stands in public scripts; 922 MB


def fetch(url: str, path: str, sha: str = "", attempts: int = 5, timeout: float = 60) -> None:
    """Download url to path: to path.part first, resumed after a break, moved into place once it is
    whole.

    sha: the start of the file's sha1 or, if that is not 40 digits long, of its sha256. timeout:
    seconds without a byte that count as a break. Of several processes one downloads and the others
    wait for it. OSError or ValueError if the file cannot be had whole or has another hash (then the
    part is deleted)."""
    part = path + ".part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(part, "ab") as file:
        fcntl.flock(
            file, fcntl.LOCK_EX
        )  # given back when the file is closed, however the process ends
        same = os.path.exists(part) and os.path.samestat(os.fstat(file.fileno()), os.stat(part))
        if os.path.exists(path):  # another process was faster
            return os.remove(part) if same else None
        if not same:  # another process had the lock, and deleted what it got
            return fetch(url, path, sha, attempts, timeout)
        try:
            for attempt in range(attempts):
                problem = fetch_rest(url, file, timeout, os.path.basename(path))
                if problem is None:
                    break
                if attempt == attempts - 1:
                    raise OSError(
                        f"{url}: {problem}; {part} is kept, the next try goes on from there"
                    )
                time.sleep(attempt)
        finally:
            file.flush()
            if os.path.getsize(part) == 0:
                os.remove(part)  # nothing came: leave nothing
        with open(part, "rb") as whole:
            digest = hashlib.file_digest(whole, "sha1" if len(sha) == 40 else "sha256").hexdigest()
        if not digest.startswith(sha):
            os.remove(part)
            raise ValueError(
                f"{url}: the file's hash is {digest}, not {sha}: damaged on the way, or not the file"
            )
        os.replace(part, path)


def fetch_rest(url: str, file: BinaryIO, timeout: float, label: str) -> str | None:
    """Append to file what it lacks of url. -> None, or what broke off and is worth another try;
    OSError if nothing is."""
    have, started = file.seek(0, os.SEEK_END), time.monotonic()
    request = urllib.request.Request(
        url, headers={"Range": f"bytes={have}-", "User-Agent": "python"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            if answer.status != 206:  # 200: the server starts over, and so do we
                have = file.truncate(0)
            length = answer.headers.get("Content-Length")  # not every server tells
            total = have + int(length) if length else None
            while block := answer.read1(1 << 20):  # (read would lose what came before a break)
                file.write(block)
                have += len(block)
                progress(f"{label}: {have / 1e6:.0f} of {(total or 0) / 1e6:.0f} MB", started)
        return (
            None if total in (have, None) else f"the server broke off after {have} of {total} bytes"
        )
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return None  # nothing left to send: the part is whole
        if error.code == 416:
            file.truncate(0)
            return f"the server has nothing after the {have} bytes of the part, which is begun anew"
        raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def progress(text: str, started: float, done: bool = False) -> None:
    """On a terminal one line that is written over, and cleared by an empty text; elsewhere only its
    last state."""
    text += f", {time.monotonic() - started:.0f} s" if text else ""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="\n" if done else "", file=sys.stderr, flush=True)
    elif done:
        print(text, file=sys.stderr)


def download(folder: str) -> str:
    """Fetch and unpack ADE20K (2016 challenge) to folder/ADEChallengeData2016; does nothing where
    that exists."""
    root = os.path.join(folder, "ADEChallengeData2016")
    if os.path.isdir(root):
        return root
    path, unpacked = os.path.join(folder, os.path.basename(URL)), os.path.join(
        folder, "unpacked.part"
    )
    if not os.path.exists(path):
        fetch(URL, path, SHA1)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            outside = entry.filename.startswith(("/", "\\")) or ".." in entry.filename.split("/")
            if outside or (entry.external_attr >> 16) & 0o170000 == 0o120000:
                raise ValueError(
                    f"{path}: holds {entry.filename!r}, a link or a path outside the folder; not unpacked"
                )
        if sum(entry.file_size for entry in archive.infolist()) > 5e9:
            raise ValueError(
                f"{path}: would unpack to more than 5 GB, the data set has 1; not unpacked"
            )
        archive.extractall(unpacked)
    os.rename(os.path.join(unpacked, "ADEChallengeData2016"), root)
    os.rmdir(unpacked)
    return root


def examine(pair: tuple[str, str], classes: Classes) -> tuple[str | None, tuple, np.ndarray]:
    """Read one sample whole: (fault or None, (H, W), pixels per label value 0..255)."""
    try:
        label = load(*pair, classes)[1]
        return None, label.shape, np.bincount(label.ravel(), minlength=256)
    except DataError as fault:
        return str(fault), (0, 0), np.zeros(256, np.int64)


def check(root: str) -> int:
    """Read every file of a data set, print what is in it and every fault by file. -> the number of
    faults"""
    total, classes = 0, read_classes(root)
    for split in ("training", "validation"):
        pairs, faults = scan(root, split)
        sizes, counts, pictures, started = (
            [],
            np.zeros(256, np.int64),
            np.zeros(256, np.int64),
            time.monotonic(),
        )
        with Pool() as pool:
            read = pool.imap(partial(examine, classes=classes), pairs, chunksize=4)
            for n, (fault, size, count) in enumerate(read, start=1):
                progress(f"{split}: {n} of {len(pairs)} pictures", started, done=n == len(pairs))
                if fault:
                    faults.append(fault)
                else:
                    sizes.append(size)
                    counts += count
                    pictures += count > 0
        total += len(faults)
        print(f"{split}: {len(sizes)} good pictures, {len(faults)} faults")
        if sizes:
            (h0, w0), (h1, w1) = np.min(sizes, axis=0), np.max(sizes, axis=0)
            present = [k for k in np.argsort(-counts[:IGNORE_INDEX]) if counts[k]]
            print(
                f"  height {h0} to {h1}, width {w0} to {w1}; {counts[IGNORE_INDEX] / counts.sum():.1%} of the pixels unlabelled; "
                f"{len(present)} of {len(classes.names)} classes:"
            )
            for k in present:
                share = counts[k] / counts.sum()
                print(
                    f"    {classes.names[k]:20s} {share:7.2%} of the pixels, {pictures[k]:6d} pictures"
                )
        for fault in faults:
            print(f"  FAULT {fault}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Get, make or check a data set in ADE20K's layout.",
        epilog="example: python ade20k.py check data/ade/ADEChallengeData2016",
    )
    parser.add_argument(
        "action",
        choices=("download", "toy", "check"),
        help="download: ADE20K, 1 GB, to DIR/ADEChallengeData"
        "2016; toy: draw a small data set in DIR; check: read all of DIR, report classes, sizes, every fault",
    )
    parser.add_argument("dir", metavar="DIR")
    args = parser.parse_args()
    try:
        if args.action == "check":
            sys.exit(1 if check(args.dir) else 0)
        print(download(args.dir) if args.action == "download" else make_toy(args.dir))
    except (DataError, OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
