"""The data: ADE20K's 150 classes, reading pictures and labels, the transforms, the samples.

    jpg, png --load--> image (H, W, 3) uint8 RGB, label (H, W) uint8: 0 -> 255 (ignored), k -> k - 1
      --train_transform(rng)--> (3, S, S) uint8, (S, S) uint8, (h, w) before padding
      --loader--> batch --normalise--> the model

Data set: ADE20K scene parsing (Zhou et al. 2017, CVPR; Zhou et al. 2019, IJCV), in the layout of
the challenge of 2016:

    ROOT/images/{training,validation}/NAME.jpg
    ROOT/annotations/{training,validation}/NAME.png
    ROOT/classes.txt                                   of data sets with other classes

As a program:  python ade20k.py {download,toy,check} DIR
"""

import argparse
import colorsys
import hashlib
import http.client
import importlib.util
import os
import re
import sys
import time
import unicodedata
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from os.path import dirname, exists, isdir, isfile, join
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, PngImagePlugin
from torch import Tensor

from upernet import IGNORE_INDEX

DEFAULT_ROOT = "data/ade/ADEChallengeData2016"

Pair = tuple[str, str]  # the paths of a picture and of its label file

# Of ImageNet, RGB. The reference uses them for ViT-B too, although its weights were pretrained with
# 127.5 / 127.5.
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)

# Names and colours of the challenge (objectInfo150, color150), the names as the reference prints
# them.
CLASSES = tuple("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
radiator, glass, clock, flag
""".strip().replace("\n", " ").split(", "))
PALETTE = np.frombuffer(bytes.fromhex("""
787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff0652
8fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0
ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff
8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff
00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff
ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff
00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff0070
5cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff500
0abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff
b8ff000085ffffd60019c2c266ff005c00ff
"""), np.uint8).reshape(150, 3)


class DataError(Exception):
    """A fault in the data, in one sentence: the file, the value, the way out."""


class Classes(NamedTuple):
    """What the labels of a data set mean. In its files 0 is "not labelled" and k class k - 1
    (zero_ignored, as in ADE20K), or k is class k and 255 "not labelled". Or (ignored_colours is a
    list) they hold the colours of the palette, and those of the list mean "not labelled"."""

    names: tuple[str, ...] = CLASSES
    palette: list[list[int]] = PALETTE.tolist()  # [R, G, B] of each, 0..255
    zero_ignored: bool = True
    ignored_colours: list[list[int]] | None = None


def read_classes(root: str) -> Classes:
    """Those of ROOT/classes.txt, or ADE20K's where there is none.

    One name a line, `R G B` behind it or none; # begins a comment. Above the first name may stand
    `ignore 0` (see zero_ignored) or `ignore 255`; or `colours`, and below it `ignore R G B` for
    colours that mean "not labelled". DataError with the line that cannot be used."""
    path = join(root, "classes.txt")
    if not exists(path):
        return Classes()

    names, palette = [], []
    zero_ignored, ignored_colours = False, None
    for line, where in text_lines(path):
        setting = re.fullmatch(r"(colou?rs|ignore)((?:\s+\d+)*)", line.lower())
        name, rgb = re.fullmatch(r"(.*?\S)((?:\s+\d+){3})?", line).groups()
        digits = setting[2] if setting else rgb or ""
        numbers = [int(x) for x in digits.split()]

        if max(numbers, default=0) > 255 or (name in names and not setting):
            raise DataError(f"{where} has a colour above 255 or a name that another line has")
        elif setting and not names and setting[1] != "ignore" and not zero_ignored:
            ignored_colours = []
        elif setting and not names and numbers in ([0], [255]) and ignored_colours is None:
            zero_ignored = numbers == [0]
        elif setting and not names and len(numbers) == 3 and ignored_colours is not None:
            ignored_colours.append(numbers)
        elif setting:
            raise DataError(
                f"{where} must be `ignore 0`, `ignore 255` or `colours` or, below `colours`, "
                "`ignore R G B`, and stand above the first class"
            )
        elif ignored_colours is not None and numbers in [[], *palette, *ignored_colours]:
            raise DataError(f"{where} has no colour of its own, which `colours` asks for")
        else:
            palette.append(numbers or default_colour(len(names)))
            names.append(name)

    if not 0 < len(names) < 256:
        raise DataError(
            f"{path}: {len(names)} classes, it must be 1 to 255 "
            "(8 bits, and one value for unlabelled pixels)"
        )
    return Classes(tuple(names), palette, zero_ignored, ignored_colours)


def text_lines(path: str) -> Iterator[tuple[str, str]]:
    """Each line without its comment, if anything is left of it, and what an error calls it."""
    if not isfile(path):
        raise DataError(f"{path}: is a folder, a pipe or a device, not a text file")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for n, line in enumerate(file, start=1):
            where = f"{path}, line {n}: {line.strip()!r}"
            if "\ufffd" in line or "\0" in line:  # as Latin-1 or UTF-16 read
                raise DataError(f"{where} is not text in UTF-8, save the file as UTF-8")

            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                yield line, where


def default_colour(k: int) -> list[int]:
    """A colour for class k. Hues in steps of the golden section are far apart however many there
    are; three brightnesses tell apart what comes near."""
    rgb = colorsys.hsv_to_rgb(k * 0.618 % 1, 0.9, 1 - k % 3 / 4)
    return [round(255 * x) for x in rgb]


# ---- reading -------------------------------------------------------------------------------------


# What EXIF's orientation says must be done to see the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Text in a png is nobody's reason to refuse it: Pillow does so above 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """A picture file; whatever goes wrong while it is open and read is a DataError."""
    try:
        if exists(path) and not isfile(path):  # one would wait for a pipe for ever
            raise ValueError("it is a folder, a pipe or a device")
        with Image.open(path) as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen different types on damaged files
        raise DataError(
            f"{path}: cannot be read as a picture ({error}), replace the file"
        ) from error


def load_image(path: str) -> ndarray:
    """Any picture Pillow can read -> (H, W, 3) uint8 RGB, upright. DataError if it cannot be read.

    Grey is repeated, alpha dropped, 16 bits are cut to the upper 8, EXIF rotation is applied: as
    cv2.imread does it."""
    with opened(path) as picture:
        picture.load()
        turn = TURNS.get(orientation(picture))
        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scale
            upper = (np.asarray(picture) >> 8).clip(0, 255)
            picture = Image.fromarray(upper.astype(np.uint8))
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        return np.asarray(picture if turn is None else picture.transpose(turn))


def orientation(picture: Image.Image) -> int:
    """EXIF's tag 274: how the camera was held. A block that cannot be read says nothing about the
    pixels, which are good, and does not stop anybody."""
    try:
        return picture.getexif().get(274, 1)
    except Exception:
        return 1


def load_label(path: str, classes: Classes = Classes()) -> ndarray:
    """A label file -> (H, W) uint8, 0..C-1, or 255 where nobody labelled.

    The file has one channel of 1 to 16 bits (of a palette, the indices), or the classes' colours.
    DataError if its format may have changed labels, or it holds a value or a colour that is no
    class."""
    with opened(path) as file:
        check_lossless(file, path)
        if classes.ignored_colours is not None:
            return label_of_colours(np.asarray(file.convert("RGB")), path, classes)
        few_bits = re.search(r"L;([24])", str(file.tile))
        values = np.asarray(file)
    if values.ndim != 2 or values.dtype.kind not in "biu" or values.min() < 0:
        raise DataError(
            f"{path}: labels must be one channel of integers from 0 on, this is {values.dtype} of "
            f"shape {values.shape}; for colours, begin classes.txt with a line `colours`"
        )
    if few_bits:  # Pillow stretches what 2 or 4 bits hold to 0..255
        stored = 2 ** int(few_bits[1]) - 1
        values = values // (255 // stored)

    count = len(classes.names)
    if classes.zero_ignored:
        largest, ignored = count, 0
    else:
        largest, ignored = count - 1, IGNORE_INDEX
    if values.max() > largest:
        above = values[(values > largest) & (values != ignored)]
        if len(above):
            raise DataError(
                f"{path}: label {above.max()} is above the {count} classes, "
                f"{ignored} is for unlabelled pixels; classes.txt says what labels mean"
            )

    label = values.astype(np.uint8)  # a copy, which may be written
    if classes.zero_ignored:  # the one place where labels are shifted
        label = label - 1
        label[values == 0] = IGNORE_INDEX
    return label


def check_lossless(file: Image.Image, path: str) -> None:
    """DataError if an opened label file is in a format that may change values, whatever its name:
    one that loses, or that may number its palette anew (GIF)."""
    kind = file.format
    good = kind in ("PNG", "TIFF", "BMP", "TGA", "WEBP", "PPM", "PCX", "SGI", "QOI")
    if kind == "TIFF":
        good = file.info["compression"] not in ("jpeg", "tiff_jpeg", "webp")
    if kind == "WEBP":
        with open(path, "rb") as content:
            good = re.search(rb"VP8[ L]", content.read())[0] == b"VP8L"
    if kind == "PPM":  # with another maximum than 255 Pillow stretches it
        good = "ppm" not in str(file.tile)
    if not good:
        raise DataError(f"{path}: is a {kind} file that may change labels, save them as png")


def label_of_colours(rgb: ndarray, path: str, classes: Classes) -> ndarray:
    """(H, W, 3) uint8, colours of classes -> (H, W) uint8, 0..C-1 or 255."""
    place = np.array([1 << 16, 1 << 8, 1])
    colours = np.array(classes.palette + classes.ignored_colours) @ place
    table = np.full(1 << 24, -1, np.int16)  # of all colours there are
    table[colours] = IGNORE_INDEX
    table[colours[: len(classes.names)]] = range(len(classes.names))

    label = table[rgb @ place]  # (H, W)
    wrong = label < 0
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        r, g, b = rgb[y, x]
        raise DataError(
            f"{path}: the pixel at x = {x}, y = {y} has the colour {r} {g} {b}, "
            "which is in no line of classes.txt"
        )
    return label.astype(np.uint8)


def load(
    image_path: str, label_path: str, classes: Classes = Classes()
) -> tuple[ndarray, ndarray]:
    """load_image and load_label of one sample; DataError if their sizes differ."""
    image = load_image(image_path)
    label = load_label(label_path, classes)
    h, w = image.shape[:2]
    label_h, label_w = label.shape
    if (h, w) != (label_h, label_w):
        raise DataError(
            f"{image_path}: the picture has {h}x{w} pixels, its label file {label_path} "
            f"{label_h}x{label_w}, they must be equal"
        )
    return image, label


# ---- transforms ----------------------------------------------------------------------------------


def train_transform(
    image: ndarray,
    label: ndarray,
    rng: np.random.Generator,
    crop: int = 512,
    short: int = 512,
) -> tuple[ndarray, ndarray, tuple[int, int]]:
    """The reference's training pipeline up to normalisation: scale, crop, flip, distort, pad.

    image (H, W, 3) uint8, label (H, W) uint8 -> (3, crop, crop) uint8, (crop, crop) uint8, (h, w)
    before padding. Padding, on the right and below, is 255 in the label. In the image it is 0
    *after* normalisation, which no uint8 can say: normalise(images, sizes) does it. Random numbers
    are drawn in the reference's order, so that a test can replay its stream."""
    # Scale the picture into (4 short, short) * U(0.5, 2).
    ratio = rng.random() * 1.5 + 0.5
    H, W = label.shape
    h, w = scaled_size(H, W, int(4 * short * ratio), int(short * ratio))
    rows = nearest_indices(H, h)
    columns = nearest_indices(W, w)

    # A crop of hardly anything but one class teaches little: it is drawn again, up to ten times,
    # while one class fills 75% or more of its labelled pixels. The eleventh is taken as it comes.
    for _ in range(11):
        y0 = rng.integers(0, max(h - crop, 0) + 1)
        x0 = rng.integers(0, max(w - crop, 0) + 1)
        y1 = min(y0 + crop, h)
        x1 = min(x0 + crop, w)
        cropped = label[rows[y0:y1]]
        cropped = cropped[:, columns[x0:x1]]  # (y1 - y0, x1 - x0)

        pixels = Image.fromarray(cropped).histogram()  # of each label
        counts = np.array(pixels[:IGNORE_INDEX])
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break

    image = resize_bilinear(image, h, w, (y0, x0, y1, x1))  # (3, y1 - y0, x1 - x0)
    if rng.random() < 0.5:
        image = image[:, :, ::-1]
        cropped = cropped[:, ::-1]
    image = distort(image, rng)

    size = cropped.shape
    pad = [(0, crop - side) for side in size]
    image = np.pad(image, [(0, 0), *pad])  # (3, crop, crop)
    cropped = np.pad(cropped, pad, constant_values=IGNORE_INDEX)  # (crop, crop)
    return image, cropped, size


def scaled_size(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The largest (h, w) of the same aspect with long side <= long, short side <= short, as
    mmcv.rescale_size; at least 1."""
    scale = min(long / max(height, width), short / min(height, width))
    h, w = (int(side * scale + 0.5) for side in (height, width))
    return max(1, h), max(1, w)


def nearest_indices(old: int, new: int) -> ndarray:
    """The source index of each of `new` pixels, as cv2's INTER_NEAREST: floor(i * old / new), not
    the pixel's centre."""
    index = np.arange(new) * (1 / (new / old))  # rounded as cv2 rounds it
    return np.minimum(index.astype(np.int64), old - 1)


def resize_bilinear(
    image: ndarray, h: int, w: int, box: tuple[int, int, int, int] | None = None
) -> ndarray:
    """What cv2.resize(image, (w, h))[y0:y1, x0:x1] gives, within one grey level, computing only
    box = (y0, x0, y1, x1).

    image (H, W, 3) uint8 -> (3, y1 - y0, x1 - x0) uint8. No antialiasing when shrinking: Pillow's
    filters, which do, would feed the network smoother pictures than the published runs saw."""
    H, W = image.shape[:2]
    y0, x0, y1, x1 = box or (0, 0, h, w)
    if (h, w) == (H, W):
        return image[y0:y1, x0:x1].transpose(2, 0, 1)

    rows, top, bottom, weight_y = neighbours(y0, y1, H, h)
    columns, left, right, weight_x = neighbours(x0, x1, W, w)
    x = image[rows, columns].transpose(2, 0, 1).astype(np.float32, order="C")

    # take(..., mode="clip") is x[:, :, left] without a check of each index.
    x = mix(
        x.take(left, 2, mode="clip"),
        x.take(right, 2, mode="clip"),
        weight_x,
    )  # (3, rows, x1 - x0)
    x = mix(x[:, top], x[:, bottom], weight_y[:, None])  # (3, y1 - y0, x1 - x0)
    x += 0.5
    return x.astype(np.uint8)


def neighbours(
    first: int, last: int, old: int, new: int
) -> tuple[slice, ndarray, ndarray, ndarray]:
    """Of an axis resized from old to new pixels: where the target pixels first..last - 1 look.

    -> the slice of the source that they need, the indices in it of the pixels before and after each
    one's centre, which lies at (i + 1/2) old / new, and the weight of the one after"""
    x = (np.arange(first, last) + 0.5) * old / new - 0.5
    index = np.floor(x).astype(np.intp)
    weight = (x - index).astype(np.float32)

    before = index.clip(0, old - 1)
    after = (index + 1).clip(0, old - 1)
    start = before[0]
    used = slice(start, after[-1] + 1)
    return used, before - start, after - start, weight


def mix(first: ndarray, second: ndarray, weight: ndarray) -> ndarray:
    """first + (second - first) * weight, in second's place: new memory costs more than sums."""
    second -= first
    second *= weight
    second += first
    return second


def distort(image: ndarray, rng: np.random.Generator) -> ndarray:
    """Photometric distortion of (3, H, W) uint8 (SSD, Liu et al. 2016, arXiv:1512.02325, section
    2.2): brightness, contrast (here or at the end), saturation, hue, each with probability 1/2."""
    if rng.integers(0, 2):
        image = scale_levels(image, offset=rng.uniform(-32, 32))

    contrast_first = rng.integers(0, 2)
    if contrast_first and rng.integers(0, 2):
        image = scale_levels(image, factor=rng.uniform(0.5, 1.5))

    if rng.integers(0, 2):
        hue, saturation, value = rgb_to_hsv(image)
        image = hsv_to_rgb(hue, scale_levels(saturation, factor=rng.uniform(0.5, 1.5)), value)

    if rng.integers(0, 2):
        hue, saturation, value = rgb_to_hsv(image)
        turned = (np.arange(180) + rng.integers(-18, 18)) % 180  # `%` on whole pictures is slow
        image = hsv_to_rgb(turned.take(hue, mode="clip"), saturation, value)

    if not contrast_first and rng.integers(0, 2):
        image = scale_levels(image, factor=rng.uniform(0.5, 1.5))
    return image


def scale_levels(x: ndarray, factor: float = 1, offset: float = 0) -> ndarray:
    """x * factor + offset, clipped to 0..255 and truncated, uint8."""
    x = x.astype(np.float32) * factor + offset
    return np.clip(x, 0, 255).astype(np.uint8)


def normalise(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 -> (x - mean) / std, float32, on the images' device; 0 outside each
    picture's (h, w) in sizes (B, 2), where the picture was padded."""
    device = images.device
    mean, std = (x.to(device, non_blocking=True) for x in (MEAN, STD))  # waits for nothing else
    x = (images.float() - mean) / std
    if sizes is None:
        return x

    H, W = x.shape[2:]
    inside_y = torch.arange(H, device=device) < sizes[:, :1]  # (B, H)
    inside_x = torch.arange(W, device=device) < sizes[:, 1:]  # (B, W)
    inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]  # (B, 1, H, W)
    return x * inside


# ---- HSV, as the reference's cv2 rounds it -------------------------------------------------------

# cv2 has HSV in uint8: hue 0..179 (2 degrees a step), saturation and value 0..255. The rounding is
# part of the recipe, since hue and saturation distortion see the picture through it.


def fixed_point(numerator: int) -> ndarray:
    """numerator / n for n = 0..255 (0 for n = 0) in 20.12 fixed point: cv2 divides by table."""
    quotients = (numerator << 12) / np.arange(1.0, 256)
    return np.rint(np.append(0, quotients)).astype(np.int32)


HUE_STEP = fixed_point(30)  # 30 / spread: a sixth of the circle is 30 steps
SATURATION_STEP = fixed_point(255)  # 255 / value

# Back to RGB (Smith 1978, "Color gamut transform pairs"): channel = value * (1 - saturation *
# fade(hue)). fade is 0 over the two of six sectors where the channel dominates (R around hue 0, G
# around 60, B around 120), 1 opposite, a ramp between. Rounded to float32 as in cv2's vector code,
# so that the truncation at the end meets the same numbers.
SECTOR = np.float64(np.arange(180, dtype=np.float32) * np.float32(6 / 180))  # 0..6
FADE = []
for start in (5, 3, 1):
    place = (SECTOR + start) % 6
    ramps = np.minimum(place, 4 - place).clip(0, 1)
    FADE.append(np.float64(np.float32(ramps)))


def rgb_to_hsv(image: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """(3, H, W) uint8 -> hue (H, W) 0..179, saturation 0..255, value 0..255, integers, equal to
    cv2's. (hue: an index)"""
    r, g, b = image.astype(np.int16)
    value = np.maximum(np.maximum(r, g), b)
    spread = value - np.minimum(np.minimum(r, g), b)

    hue = np.where(value == g, b - r + 2 * spread, r - g + 4 * spread)
    hue = np.where(value == r, g - b, hue)
    hue = hue * HUE_STEP.take(spread, mode="clip")
    saturation = spread * SATURATION_STEP.take(value, mode="clip")
    for x in (saturation, hue):
        x += 1 << 11  # rounds what the shift cuts
        x >>= 12
    hue += (hue >> 31) & 180  # where it is negative
    return hue.astype(np.intp), saturation, value


def hsv_to_rgb(hue: ndarray, saturation: ndarray, value: ndarray) -> ndarray:
    """The inverse of rgb_to_hsv, truncated, equal to what cv2 computes in vectors (ends of rows it
    rounds). -> (3, H, W) uint8"""
    unit = np.float32(1 / 255)
    value = value.astype(np.float32) * unit
    saturation = np.float64(saturation.astype(np.float32) * unit)

    # float64 inside the bracket, rounded once: cv2 uses a fused multiply-add there.
    image = np.empty((3, *hue.shape), np.uint8)
    for channel, fade in zip(image, FADE):
        x = fade.take(hue, mode="clip")
        x *= saturation
        x = np.subtract(1, x, out=x).astype(np.float32)
        x *= value
        channel[:] = np.multiply(x, np.float32(255), out=x)
    return image


# ---- samples -------------------------------------------------------------------------------------


@dataclass
class TrainSet(torch.utils.data.Dataset):
    """Sample number `position` of the run: which picture, and how it is cut and distorted, follow
    from (seed, position) alone. So neither the number of workers nor of processes changes a run,
    and one resumed at iteration i goes on with the samples it would have seen, at once."""

    pairs: list[Pair]
    seed: int
    crop: int = 512
    short: int = 512
    classes: Classes = Classes()

    def paths(self, position: int) -> Pair:
        """Of the picture and its label. Every pass over the data has an order of its own."""
        epoch, i = divmod(position, len(self.pairs))
        rng = np.random.default_rng([self.seed, epoch, 0])
        return self.pairs[rng.permutation(len(self.pairs))[i]]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> image (3, S, S) uint8, label (S, S) uint8, size (2,) before padding"""
        image, label = load(*self.paths(position), self.classes)
        rng = np.random.default_rng([self.seed, position, 1])
        image, label, size = train_transform(image, label, rng, self.crop, self.short)
        return torch.from_numpy(image), torch.from_numpy(label), torch.tensor(size)


def positions(
    start: int, iters: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """The positions of each iteration's batch, [i * batch, (i + 1) * batch): of them one process's
    equal part."""
    count = batch // world
    for i in range(start, iters):
        first = i * batch + rank * count
        yield list(range(first, first + count))


def load_pair(
    pair: tuple[str, str | None], classes: Classes
) -> tuple[str, ndarray, ndarray | None]:
    """(image path, label path or None) -> image path, picture and label (or None) at their own
    size."""
    image_path, label_path = pair
    if label_path is None:
        return image_path, load_image(image_path), None
    return image_path, *load(image_path, label_path, classes)


# ---- finding the files, and their faults ---------------------------------------------------------


def find_pairs(root: str, split: str, optional: bool = False) -> list[Pair]:
    """The (image, label) paths of ROOT/images/SPLIT and ROOT/annotations/SPLIT, sorted by name.

    Looks at every file's header too. DataError with the first fault, or if there are no pictures.
    optional: [] where neither folder exists."""
    if optional and not has_split(root, split):
        return []

    pairs, faults = scan(root, split)
    with ThreadPool(16) as threads:  # they wait for a (network) disk, and compute nothing
        faults += filter(None, threads.map(header_fault, pairs))

    if faults:
        first, *others = faults
        more = f"; and {len(others)} faults more" if others else ""
        raise DataError(f"{first}{more}; `python ade20k.py check {root}` lists all")
    if not pairs:
        raise DataError(f"{root}/images/{split}: holds no pictures")
    return pairs


def has_split(root: str, split: str) -> bool:
    """Is there any folder of a split? One alone is a fault, none may be meant so."""
    folders = [join(root, kind, split) for kind in ("images", "annotations")]
    return any(map(isdir, folders))


def scan(root: str, split: str) -> tuple[list[Pair], list[str]]:
    """-> the (image, label) paths, sorted by name, and a sentence for each file that is alone or of
    a name that another has"""
    image_folder = join(root, "images", split)
    label_folder = join(root, "annotations", split)
    for folder in (image_folder, label_folder):
        if not isdir(folder):
            raise DataError(missing_folder(root, folder))

    faults = []
    images = files_by_stem(image_folder, faults)
    labels = files_by_stem(label_folder, faults)
    for stem, image in images.items():
        if stem not in labels:
            wanted = join(label_folder, stem)
            faults.append(f"{image}: its label file {wanted}.png is missing")
    for stem, label in labels.items():
        if stem not in images:
            faults.append(f"{label}: its picture in {image_folder} is missing")

    pairs = [(images[stem], labels[stem]) for stem in images if stem in labels]
    return pairs, faults


def files_by_stem(folder: str, faults: list[str]) -> dict[str, str]:
    """-> {name without suffix: path} of the pictures in a folder, sorted by name; a name that comes
    twice is added to faults"""
    suffixes, paths = picture_suffixes(), {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        stem = unicodedata.normalize("NFC", stem)  # "é" may be one letter, or "e" and its accent
        if suffix.lower() not in suffixes:
            continue
        path = join(folder, name)
        if stem in paths:
            faults.append(f"{path}: has the name of {paths[stem]}, remove or rename one of them")
        else:
            paths[stem] = path
    return paths


def picture_suffixes() -> set[str]:
    """Of all formats that Pillow reads: .jpg, .png, .tif, ..., in small letters."""
    formats = Image.registered_extensions()
    return {suffix for suffix, kind in formats.items() if kind in Image.OPEN}


def missing_folder(root: str, folder: str) -> str:
    """The sentence about a folder that a data set should have. root may be too high above a data
    set, too deep in it, or the other release of ADE20K."""
    if isdir(f"{root}/images/ADE") or exists(f"{root}/index_ade20k.pkl"):
        return (
            f"{root}: this is the full ADE20K release of 2021, with other labels than the "
            "challenge set of 2016 that the recipes use; "
            "`python ade20k.py download data/ade` fetches that one (1 GB)"
        )

    names = [*sorted(os.listdir(root)), "..", "../.."] if isdir(root) else []
    for name in names:
        near = os.path.normpath(join(root, name))
        if isdir(f"{near}/images/training") and isdir(f"{near}/annotations/training"):
            return f"{root}: holds no data set itself, but {near} does: use --data {near}"

    if root == DEFAULT_ROOT:
        return (
            f"{folder}: no such folder; `python ade20k.py download data/ade` fetches ADE20K "
            "(1 GB), --data DIR names another data set, --data toy draws a small one"
        )
    return (
        f"{folder}: no such folder; a data set holds its pictures in images/training and "
        "images/validation, and label files of the same names in annotations/training and "
        "annotations/validation"
    )


def header_fault(pair: Pair) -> str | None:
    """What the first bytes of the two files tell: unreadable, or of different sizes (turned by EXIF
    or not)."""
    try:
        with opened(pair[0]) as image, opened(pair[1]) as label:
            check_lossless(label, pair[1])
            w, h = image.size
            label_w, label_h = label.size
    except DataError as fault:
        return str(fault)
    if sorted((w, h)) != sorted((label_w, label_h)):
        return f"{pair[0]}: the picture is {w}x{h}, its label file {pair[1]} {label_w}x{label_h}"
    return None


def label_warnings(pairs: list[Pair], classes: Classes, most: int = 300) -> list[str]:
    """class_warnings of the label files, or of `most` spread evenly over them (a second's work)."""
    step = max(1, len(pairs) // most)
    some = [label_path for _, label_path in pairs[::step][:most]]
    pixels = np.zeros(256, np.int64)
    with ThreadPool() as threads:
        for label in threads.imap(partial(load_label, classes=classes), some):
            pixels += np.bincount(label.ravel(), minlength=256)
    return class_warnings(pixels, classes, len(some), len(pairs))


def class_warnings(pixels: ndarray, classes: Classes, seen: int, total: int) -> list[str]:
    """What no training can learn from these labels, in sentences. pixels: (256,), how many have
    each label, in `seen` of `total` label files."""
    count = len(classes.names)
    missing = [name for name, n in zip(classes.names, pixels) if n == 0]
    named = missing[:20]
    if len(missing) > 20:
        named.append(f"and {len(missing) - 20} more")
    warnings = []

    # Rare classes may well be absent from a part of a large set; many of them is another matter.
    if missing and (seen == total or len(missing) > count / 3):
        warnings.append(
            f"{len(missing)} of {count} classes are in none of the training labels "
            f"({seen} of {total} files were looked at): {', '.join(named)}"
        )
    if len(missing) > count - 2:
        warnings.append("with fewer than two classes in the labels there is nothing to learn")
    return warnings


# ---- the toy data set ----------------------------------------------------------------------------


def data_root(name: str) -> str:
    """The folder that --data means: `toy` is drawn where it is missing, everything else is a
    path."""
    return make_toy("data/toy") if name == "toy" else name


def make_toy(root: str) -> str:
    """Draw the toy data set, 96 training and 24 validation pictures in ADE20K's layout, in root; if
    it is there, leave it. -> root"""
    path = join(dirname(os.path.abspath(__file__)), "tests", "toy.py")
    if not exists(path):
        raise DataError(f"{path}: is missing, it draws the toy data set: copy the folder tests too")

    # By its path, from whatever folder this runs in: no package needs to be installed.
    spec = importlib.util.spec_from_file_location("toy", path)
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    return toy.make_toy(root)


# ---- fetching ------------------------------------------------------------------------------------

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"  # as it stands in public scripts; 922 MB


def fetch(
    url: str,
    path: str,
    sha: str = "",
    attempts: int = 5,
    timeout: float = 60,
) -> None:
    """Download url to path: to path.part first, resumed after a break, moved into place once it is
    whole.

    sha: the start of the file's sha1 or, if that is not 40 digits long, of its sha256. timeout:
    seconds without a byte that count as a break. OSError or ValueError if the file cannot be had
    whole or has another hash (then the part is deleted)."""
    part = path + ".part"
    os.makedirs(dirname(path) or ".", exist_ok=True)

    for attempt in range(attempts):
        time.sleep(attempt)
        problem = fetch_rest(url, part, timeout)
        if problem is None:
            break
    else:
        raise OSError(f"{url}: {problem}; the next try goes on from there")

    with open(part, "rb") as file:
        kind = "sha1" if len(sha) == 40 else "sha256"
        digest = hashlib.file_digest(file, kind).hexdigest()
    if not digest.startswith(sha):
        os.remove(part)
        raise ValueError(
            f"{url}: the file's hash is {digest}, not {sha}: damaged on the way, or not the file; "
            f"{part} is deleted"
        )
    os.replace(part, path)


def fetch_rest(url: str, part: str, timeout: float) -> str | None:
    """Append to part what it lacks of url. -> None, or what broke off and is worth another try;
    OSError if nothing is."""
    have = os.path.getsize(part) if exists(part) else 0
    started = time.monotonic()
    request = urllib.request.Request(url, headers={"User-Agent": "python"})
    if have:
        request.add_header("Range", f"bytes={have}-")

    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer, open(part, "ab") as file:
            if answer.status != 206:  # 200: the server knows no ranges, and sends all of it
                file.seek(0)
                have = file.truncate()
            length = answer.headers.get("Content-Length")  # not every server tells
            total = have + int(length or 0)

            while block := answer.read1(1 << 20):  # (read would lose what came before a break)
                file.write(block)
                have += len(block)
                progress(f"{part}: {have // 10**6} of {total // 10**6} MB", started)

        have = os.path.getsize(part)  # (more than it should be if another process fetches too)
        if length and have != total:
            return f"the server broke off after {have} of {total} bytes"
        return None
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
        os.remove(part)
        return f"the server has nothing after the {have} bytes of {part}, which is deleted"
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
    that exists. -> its path"""
    root = join(folder, "ADEChallengeData2016")
    if isdir(root):
        return root

    path = join(folder, os.path.basename(URL))
    if not exists(path):
        fetch(URL, path, SHA1)

    unpacked = join(folder, "unpacked.part")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith(("/", "\\")) or ".." in name.split("/"):
                raise ValueError(f"{path}: holds {name!r}, outside the folder; not unpacked")
        archive.extractall(unpacked)
    os.rename(join(unpacked, "ADEChallengeData2016"), root)
    os.rmdir(unpacked)
    return root


# ---- python ade20k.py ----------------------------------------------------------------------------


def check(root: str) -> int:
    """Read every file of a data set, print what is in it and every fault by file. -> the number of
    faults"""
    classes = read_classes(root)
    faults = check_split(root, "training", classes)
    if not has_split(root, "validation"):
        print("validation: none, training goes without")
        return faults
    return faults + check_split(root, "validation", classes)


def check_split(root: str, split: str, classes: Classes) -> int:
    """-> the number of faults"""
    pairs, faults = scan(root, split)
    good, started = [], time.monotonic()
    read = partial(read_sample, classes=classes)
    with ThreadPool() as threads:  # while one decodes, others run
        for n, (fault, *sample) in enumerate(threads.imap(read, pairs), start=1):
            so_far = f"{split}: {n} of {len(pairs)} pictures"
            progress(so_far, started, done=n == len(pairs))
            if fault:
                faults.append(fault)
            else:
                good.append(sample)

    print(f"{split}: {len(good)} good pictures, {len(faults)} faults")
    if good:
        print_contents(good, split, classes)
    for fault in faults:
        print(f"  FAULT {fault}")
    return len(faults)


def read_sample(pair: Pair, classes: Classes) -> tuple:
    """Read one sample whole. -> None, (H, W), (256,) pixels of each label; or its fault"""
    try:
        label = load(*pair, classes)[1]
        return None, label.shape, np.bincount(label.ravel(), minlength=256)
    except DataError as fault:
        return (str(fault),)


def print_contents(samples: list[tuple], split: str, classes: Classes) -> None:
    """samples: [(H, W), (256,) pixels of each label] of each picture."""
    sizes, counts = (np.array(x) for x in zip(*samples))
    h0, w0 = sizes.min(axis=0)
    h1, w1 = sizes.max(axis=0)
    pixels = counts.sum(axis=0)  # (256,)
    pictures = (counts > 0).sum(axis=0)  # (256,), how many hold each label
    share = pixels / pixels.sum()
    present = [k for k in np.argsort(-pixels[:IGNORE_INDEX]) if pixels[k]]

    print(
        f"  height {h0} to {h1}, width {w0} to {w1}; {share[IGNORE_INDEX]:.1%} of the pixels "
        f"unlabelled; {len(present)} of {len(classes.names)} classes:"
    )
    for k in present:
        name = classes.names[k]
        print(f"    {name:20s} {share[k]:7.2%} of the pixels, {pictures[k]:6d} pictures")

    if split == "training":
        for warning in class_warnings(pixels, classes, len(samples), len(samples)):
            print(f"  WARNING {warning}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Get, make or check a data set in ADE20K's layout.",
        epilog="example: python ade20k.py check data/ade/ADEChallengeData2016",
    )
    parser.add_argument(
        "action",
        choices=("download", "toy", "check"),
        help="download: ADE20K, 1 GB, to DIR/ADEChallengeData2016; toy: draw a small data set in "
        "DIR; check: read all of DIR, report classes, sizes, every fault",
    )
    parser.add_argument("dir", metavar="DIR")
    args = parser.parse_args()

    try:
        if args.action == "check":
            sys.exit(1 if check(args.dir) else 0)
        make = {"download": download, "toy": make_toy}[args.action]
        print(make(args.dir))
    except (DataError, OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
