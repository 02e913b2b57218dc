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
import os
import re
import shutil
import sys
import time
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from os.path import dirname, exists, getsize, isdir, isfile, join, splitext
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, PngImagePlugin
from PIL.Image import Transpose
from scipy.ndimage import gaussian_filter
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


class UserError(Exception):
    """What the user can mend, in one sentence: the file or the option, its value, the way out."""


class DataError(UserError):
    """A fault in the data."""


@contextmanager
def about(path: str, kind: type[UserError] = DataError) -> Iterator[None]:
    """Whatever goes wrong inside becomes one sentence that begins with the file's name."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise almost anything
        raise kind(f"{path}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an exception says, without the advice that follows; its kind where it says nothing."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0]


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Errors that the user can mend end the program with one sentence and exit code 2, without a
    traceback. All four programs run inside it."""
    try:
        yield
    except (UserError, OSError) as error:
        # A loader's process puts its traceback before the sentence.
        sentence = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        print(f"error: {one_line(sentence)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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
        # A setting, or a name with its three numbers or without.
        setting = re.fullmatch(r"(colou?rs|ignore)((?:\s+\d+)*)", line.lower())
        name, rgb = re.fullmatch(r"(.*?\S)((?:\s+\d+){3})?", line).groups()
        digits = setting[2] if setting else rgb or ""
        numbers = [int(x) for x in digits.split()]

        if max(numbers, default=0) > 255 or (name in names and not setting):
            raise DataError(f"{where} has a colour above 255 or a name that another line has")

        if not setting:
            if ignored_colours is not None and numbers in [[], *palette, *ignored_colours]:
                raise DataError(f"{where} has no colour of its own, which `colours` asks for")
            palette.append(numbers or default_colour(len(names)))
            names.append(name)
        elif not names and setting[1] != "ignore" and not zero_ignored:
            ignored_colours = []
        elif not names and numbers in ([0], [255]) and ignored_colours is None:
            zero_ignored = numbers == [0]
        elif not names and len(numbers) == 3 and ignored_colours is not None:
            ignored_colours.append(numbers)
        else:
            raise DataError(
                f"{where} must be `ignore 0`, `ignore 255` or `colours` or, below `colours`, "
                "`ignore R G B`, and stand above the first class"
            )

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
    hue = k * 0.618 % 1
    value = 1 - k % 3 / 4
    rgb = colorsys.hsv_to_rgb(hue, 0.9, value)
    return [round(255 * x) for x in rgb]


# ---- reading -------------------------------------------------------------------------------------


# What EXIF's orientation says must be done to see the picture upright.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# Text in a png is nobody's reason to refuse it: Pillow does so above 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28


@contextmanager
def opened(path: str, label: bool = False) -> Iterator[Image.Image]:
    """A picture file or, of a format that keeps every value, a label file. Whatever goes wrong
    while it is open and read is a DataError that names it."""
    try:
        if exists(path) and not isfile(path):  # one would wait for a pipe for ever
            raise ValueError("it is a folder, a pipe or a device")
        with Image.open(path) as file:
            if label and may_change_values(file):
                raise DataError(f"is a {file.format} file that may change labels, save them as png")
            yield file
    except Exception as error:  # Pillow's decoders raise a dozen different types on damaged files
        fault = f"cannot be read as a picture ({error}), replace the file"
        if isinstance(error, DataError):
            fault = error
        raise DataError(f"{path}: {fault}") from error


def may_change_values(file: Image.Image) -> bool:
    """Is an open file, whatever its name, in a format that loses, or may number a palette anew
    (GIF)?"""
    if file.format == "TIFF":
        return file.info["compression"] in ("jpeg", "tiff_jpeg", "webp")
    if file.format == "PPM":  # with another maximum than 255 Pillow stretches it
        return "ppm" in str(file.tile)
    if file.format == "WEBP":
        with open(file.filename, "rb") as content:
            return re.search(rb"VP8[ L]", content.read())[0] != b"VP8L"
    return file.format not in ("PNG", "BMP", "TGA", "PCX", "SGI", "QOI")


def load_image(path: str) -> ndarray:
    """Any picture Pillow can read -> (H, W, 3) uint8 RGB, upright. DataError if it cannot be read.

    Grey is repeated, alpha dropped, 16 bits are cut to the upper 8, EXIF rotation is applied: as
    cv2.imread does it."""
    with opened(path) as picture:
        picture.load()
        turn = None
        with suppress(Exception):  # an EXIF block that cannot be read says nothing about pixels
            turn = TURNS.get(picture.getexif().get(274))

        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scale
            upper = (np.asarray(picture) >> 8).clip(0, 255)
            picture = Image.fromarray(upper.astype(np.uint8))

        picture = picture.convert("RGB")
        return np.asarray(picture if turn is None else picture.transpose(turn))


def load_label(path: str, classes: Classes = Classes()) -> ndarray:
    """A label file -> (H, W) uint8, 0..C-1, or 255 where nobody labelled.

    The file has one channel of 1 to 16 bits (of a palette, the indices), or the classes' colours.
    DataError if its format may have changed labels, or it holds a value or a colour that is no
    class."""
    with opened(path, label=True) as file:
        if classes.ignored_colours is None:
            return label_of_numbers(file, classes)
        return label_of_colours(file, classes)


def label_of_numbers(file: Image.Image, classes: Classes) -> ndarray:
    """A label file of one channel -> (H, W) uint8, 0..C-1 or 255."""
    coding = str(file.tile)
    values = np.asarray(file)
    if values.ndim != 2 or values.dtype.kind not in "biu" or values.min() < 0:
        raise DataError(
            f"labels must be one channel of integers from 0 on, this is {values.dtype} of shape "
            f"{values.shape}; for colours, begin classes.txt with a line `colours`"
        )

    if "L;2" in coding:  # Pillow has stretched 0..3 to 0..255
        values = values // 85
    if "L;4" in coding:  # and 0..15
        values = values // 17

    first, unlabelled = 0, IGNORE_INDEX  # what the file holds for class 0, and for no class
    if classes.zero_ignored:
        first, unlabelled = 1, 0
    count = len(classes.names)
    wrong = values[(values >= first + count) & (values != unlabelled)]
    if wrong.size:
        raise DataError(
            f"label {wrong.max()} is above the {count} classes, {unlabelled} is for unlabelled "
            "pixels; classes.txt says what labels mean"
        )

    # The one place where labels are shifted.
    label = np.where(values == unlabelled, IGNORE_INDEX, values - first)
    return label.astype(np.uint8)


def label_of_colours(file: Image.Image, classes: Classes) -> ndarray:
    """A label file in the colours of classes -> (H, W) uint8, 0..C-1 or 255."""
    if ";16" in str(file.tile):  # Pillow cuts colours of 16 bits, and clips grey
        values = np.asarray(file)
        between = values[values > 255] < 65535
        if values.ndim == 3 or between.any():
            raise DataError(
                "has colours of 16 bits, those in classes.txt have 8: save it as a png of 8 bits"
            )

    table = np.full((256, 256, 256), -1, np.int16)  # the label of every colour there is
    for colour in classes.ignored_colours:
        table[*colour] = IGNORE_INDEX
    for k, colour in enumerate(classes.palette):
        table[*colour] = k

    rgb = np.asarray(file.convert("RGB"))
    label = table[*rgb.transpose(2, 0, 1)]  # (H, W)
    if label.min() < 0:
        y, x = np.argwhere(label < 0)[0]
        r, g, b = rgb[y, x]
        raise DataError(
            f"the pixel at x = {x}, y = {y} has the colour {r} {g} {b}, "
            "which is in no line of classes.txt"
        )
    return label.astype(np.uint8)


def load(
    image_path: str, label_path: str | None, classes: Classes = Classes()
) -> tuple[ndarray, ndarray | None]:
    """load_image and load_label of one sample; DataError if their sizes differ."""
    image = load_image(image_path)
    if label_path is None:
        return image, None

    label = load_label(label_path, classes)
    require_equal(image_path, image.shape[:2], label_path, label.shape)
    return image, label


def check_headers(image_path: str, label_path: str) -> None:
    """DataError if the first bytes of the two files tell that they cannot be read, or are of
    different sizes (one of them turned by EXIF or not)."""
    with opened(image_path) as image:
        sides = sorted(image.size)
    with opened(label_path, label=True) as label:
        label_sides = sorted(label.size)

    require_equal(image_path, sides, label_path, label_sides)


def require_equal(image_path: str, size: tuple, label_path: str, label_size: tuple) -> None:
    """DataError if a picture and its label file differ in their two sides."""
    if size != label_size:
        h, w = size
        label_h, label_w = label_size
        raise DataError(
            f"{image_path}: the picture has {h}x{w} pixels, its label file {label_path} "
            f"{label_h}x{label_w}, they must be equal"
        )


# ---- transforms ----------------------------------------------------------------------------------


def train_transform(
    image: ndarray, label: ndarray, rng: Generator, crop: int = 512, short: int = 512
) -> tuple[ndarray, ndarray, tuple[int, int]]:
    """The reference's training pipeline up to normalisation: scale, crop, flip, distort, pad.

    image (H, W, 3) uint8, label (H, W) uint8 -> (3, crop, crop) uint8, (crop, crop) uint8, (h, w)
    before padding. Padding, on the right and below, is 255 in the label. In the image it is 0
    *after* normalisation, which no uint8 can say: normalise(images, sizes) does it. Random numbers
    are drawn in the reference's order, so that a test can replay its stream."""
    # Scale the picture into (4 short, short) * U(0.5, 2).
    H, W = label.shape
    ratio = rng.random() * 1.5 + 0.5
    long = 4 * short
    h, w = scaled_size(H, W, int(long * ratio), int(short * ratio))
    rows = nearest_indices(H, h)
    columns = nearest_indices(W, w)
    label = label[rows][:, columns]  # (h, w)

    label, y, x = random_crop(label, crop, rng)
    size = height, width = label.shape  # crop, or less where the picture is smaller
    box = (y, x, y + height, x + width)
    image = resize_bilinear(image, h, w, box)  # (3, height, width)

    if rng.random() < 0.5:
        image = image[:, :, ::-1]
        label = label[:, ::-1]
    image = distort(image, rng)

    pad = [(0, crop - side) for side in size]
    image = np.pad(image, [(0, 0), *pad])  # (3, crop, crop)
    label = np.pad(label, pad, constant_values=IGNORE_INDEX)  # (crop, crop)
    return image, label, size


def random_crop(label: ndarray, crop: int, rng: Generator) -> tuple[ndarray, int, int]:
    """A crop that teaches something, and its upper left corner y, x.

    One of hardly anything but one class is drawn again, up to ten times, while that class fills 75%
    or more of its labelled pixels. The eleventh is taken as it comes."""
    h, w = label.shape
    for _ in range(11):
        y = rng.integers(0, max(h - crop, 0) + 1)
        x = rng.integers(0, max(w - crop, 0) + 1)
        cropped = label[y : y + crop, x : x + crop]

        histogram = Image.fromarray(cropped).histogram()  # (bincount takes twice as long)
        pixels = np.array(histogram[:IGNORE_INDEX])  # of each class
        if pixels.max() < 0.75 * pixels.sum():
            break
    return cropped, y, x


def scaled_size(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The largest (h, w) of the same aspect with long side <= long, short side <= short, as
    mmcv.rescale_size; at least 1."""
    scale = min(long / max(height, width), short / min(height, width))
    h = int(height * scale + 0.5)
    w = int(width * scale + 0.5)
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
    y0, x0, y1, x1 = box or (0, 0, h, w)
    H, W, _ = image.shape
    y = source_places(y0, y1, H, h)
    x = source_places(x0, x1, W, w)

    # Take the rows that the target needs, mix their columns, mix the rows.
    first, end = int(y[0]), int(y[-1]) + 2
    rows = image[first:end]  # (n, W, 3)
    image = rows.transpose(2, 0, 1).astype(np.float32, order="C")
    image = interpolate(image, x, axis=2)  # (3, n, x1 - x0)
    image = interpolate(image, y - first, axis=1)  # (3, y1 - y0, x1 - x0)
    image += 0.5
    return image.astype(np.uint8)


def source_places(first: int, end: int, old: int, new: int) -> ndarray:
    """Of an axis resized from old to new pixels: the places in the source that the centres of the
    target pixels first to end - 1 come from."""
    return (np.arange(first, end) + 0.5) * old / new - 0.5


def interpolate(x: ndarray, place: ndarray, axis: int) -> ndarray:
    """x (3, H, W) float32 at places between its pixels along an axis: 2.25 is a quarter of the
    way from pixel 2 to pixel 3."""
    index = np.floor(place).astype(np.intp)
    weight = (place - index).astype(np.float32)
    if axis == 1:
        weight = weight[:, None]

    # Beyond the border (mode="clip") its pixels go on. In place: new memory costs more than sums.
    before = x.take(index, axis, mode="clip")
    after = x.take(index + 1, axis, mode="clip")
    after -= before
    after *= weight
    after += before
    return after  # before + (after - before) * weight


def distort(image: ndarray, rng: Generator) -> ndarray:
    """Photometric distortion of (3, H, W) uint8 (SSD, Liu et al. 2016, arXiv:1512.02325, section
    2.2): brightness, contrast (here or at the end), saturation, hue, each with probability 1/2."""
    coin = partial(rng.integers, 0, 2)
    if coin():
        image = scale_levels(image, 1, rng.uniform(-32, 32))

    contrast_first = coin()
    if contrast_first and coin():
        image = scale_levels(image, rng.uniform(0.5, 1.5))

    if coin():
        hue, saturation, value = rgb_to_hsv(image)
        saturation = scale_levels(saturation, rng.uniform(0.5, 1.5))
        image = hsv_to_rgb(hue, saturation, value)

    if coin():
        hue, saturation, value = rgb_to_hsv(image)
        turned = (np.arange(180) + rng.integers(-18, 18)) % 180  # of each hue: `%` is slow
        image = hsv_to_rgb(turned.take(hue), saturation, value)

    if not contrast_first and coin():
        image = scale_levels(image, rng.uniform(0.5, 1.5))
    return image


def scale_levels(x: ndarray, factor: float, offset: float = 0) -> ndarray:
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

    h, w = sizes.T.reshape(2, -1, 1, 1, 1)  # each (B, 1, 1, 1)
    row = torch.arange(x.shape[2], device=device)[:, None]  # (H, 1)
    column = torch.arange(x.shape[3], device=device)  # (W)
    return x * ((row < h) & (column < w))


# ---- HSV, as the reference's cv2 rounds it -------------------------------------------------------

# cv2 has HSV in uint8: hue 0..179 (2 degrees a step), saturation and value 0..255. The rounding is
# part of the recipe, since hue and saturation distortion see the picture through it.


def fixed_point(numerator: int) -> ndarray:
    """numerator / n for n = 0..255 (0 for n = 0) in 20.12 fixed point: cv2 divides by table."""
    quotients = (numerator << 12) / np.arange(1.0, 256)
    return np.rint(np.append(0, quotients)).astype(np.int32)


HUE_STEP = fixed_point(30)  # 30 / spread: a sixth of the circle is 30 steps
SATURATION_STEP = fixed_point(255)  # 255 / value


def rgb_to_hsv(image: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """(3, H, W) uint8 -> hue (H, W) 0..179, saturation 0..255, value 0..255, integers, equal to
    cv2's."""
    r, g, b = rgb = image.astype(np.int16)
    value = rgb.max(axis=0)
    spread = value - rgb.min(axis=0)

    # Around the largest channel: red stands at 0, green at 60, blue at 120.
    hue = np.where(value == g, b - r + 2 * spread, r - g + 4 * spread)
    hue = np.where(value == r, g - b, hue)

    saturation = spread * SATURATION_STEP.take(value, mode="clip")
    hue = hue * HUE_STEP.take(spread, mode="clip")
    for x in (saturation, hue):
        x += 1 << 11  # rounds what the shift cuts
        x >>= 12
    hue[hue < 0] += 180
    return hue.astype(np.intp), saturation, value  # (hue: an index)


# Back to RGB (Smith 1978, "Color gamut transform pairs"): channel = value * (1 - saturation *
# fade(hue)). fade is 0 over the two of six sectors where the channel dominates (R around hue 0, G
# around 60, B around 120), 1 opposite, a ramp between. Rounded to float32 as in cv2's vector code,
# so that the truncation at the end meets the same numbers.
SECTOR = np.arange(180, dtype=np.float32) * np.float32(6 / 180)  # 0..6
PLACE = (np.float64(SECTOR) + [[5], [3], [1]]) % 6  # (3, 180): of R, G, B
RAMP = np.minimum(PLACE, 4 - PLACE).clip(0, 1)
FADE = np.float64(np.float32(RAMP))


def hsv_to_rgb(hue: ndarray, saturation: ndarray, value: ndarray) -> ndarray:
    """The inverse of rgb_to_hsv, truncated, equal to what cv2 computes in vectors (ends of rows it
    rounds). -> (3, H, W) uint8"""
    unit = np.float32(1 / 255)
    value = value.astype(np.float32) * unit
    saturation = np.float64(saturation.astype(np.float32) * unit)

    image = np.empty((3, *hue.shape), np.uint8)
    for channel, fade in zip(image, FADE):
        # float64 up to the bracket's end, rounded once: cv2 uses a fused multiply-add there.
        x = fade.take(hue)
        x *= saturation
        x = np.float32(1 - x)
        x *= value
        x *= np.float32(255)
        channel[:] = x
    return image


# ---- samples -------------------------------------------------------------------------------------


@dataclass
class TrainSet(torch.utils.data.Dataset):
    """Sample number `position` of the run: which picture it is, and how it is cut and distorted,
    follows from (seed, position) alone. So neither the number of workers nor of processes changes a
    run, and one resumed at iteration i goes on with the samples it would have seen, at once."""

    pairs: list[Pair]
    seed: int
    crop: int = 512
    short: int = 512
    classes: Classes = Classes()

    def paths(self, position: int) -> Pair:
        """Of the picture and its label. Every pass over the data has an order of its own."""
        epoch, i = divmod(position, len(self.pairs))
        rng = default_rng([self.seed, epoch, 0])
        return self.pairs[rng.permutation(len(self.pairs))[i]]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> image (3, S, S) uint8, label (S, S) uint8, size (2,) before padding"""
        image, label = load(*self.paths(position), self.classes)
        rng = default_rng([self.seed, position, 1])
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


# ---- finding the files, and their faults ---------------------------------------------------------


def find_pairs(root: str, split: str, optional: bool = False) -> list[Pair]:
    """The (image, label) paths of ROOT/images/SPLIT and ROOT/annotations/SPLIT, sorted by name.

    Looks at every file's header too. DataError with the first fault, or if there are no pictures.
    optional: [] where neither folder exists."""
    if optional and not has_split(root, split):
        return []

    pairs, faults = scan(root, split)
    _, more = read_all(check_headers, pairs)
    faults += more
    if faults:
        first, *others = faults
        if others:
            first += f"; and {len(others)} faults more"
        raise DataError(f"{first}; `python ade20k.py check {root}` lists all")
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

    pairs, faults = [], []
    images = files_by_stem(image_folder)
    labels = files_by_stem(label_folder)
    for stem in images | labels:
        match images[stem], labels[stem]:
            case [image], [label]:
                pairs.append((image, label))
            case [image], []:
                wanted = join(label_folder, stem)
                faults.append(f"{image}: its label file {wanted}.png is missing")
            case [], [label]:
                faults.append(f"{label}: its picture in {image_folder} is missing")
            case both:  # of which one holds two files or more
                first, twin, *_ = max(both, key=len)
                faults.append(f"{twin}: has the name of {first}, remove or rename one of them")
    return pairs, faults


def files_by_stem(folder: str) -> dict[str, list[str]]:
    """-> {name without suffix: paths} of the files in any format that Pillow reads, sorted by name.
    Names are one that differ in case or in how an accent is spelled ("é" may be one letter, or "e"
    and its accent): on some disks they are one file, and so are the results made of them."""
    formats = Image.registered_extensions()
    files = defaultdict(list)
    for name in sorted(os.listdir(folder)):
        stem, suffix = splitext(name)
        if formats.get(suffix.lower()) in Image.OPEN:
            stem = unicodedata.normalize("NFC", stem).casefold()
            files[stem].append(join(folder, name))
    return files


def read_all(read: Callable, pairs: list[Pair], title: str = "") -> tuple[list, list[str]]:
    """read(image path, label path) of all pairs, in threads: while one waits for a disk, or
    decodes, others run. -> what it returned, in order, and the sentences of its DataErrors"""
    results, faults = [], []
    started = time.monotonic()

    def read_or_fault(pair: Pair) -> object:
        try:
            return read(*pair)
        except DataError as fault:
            return fault

    with ThreadPool(16) as threads:
        for n, result in enumerate(threads.imap(read_or_fault, pairs), start=1):
            if isinstance(result, DataError):
                faults.append(str(result))
            else:
                results.append(result)
            if title:
                so_far = f"{title}: {n} of {len(pairs)} pictures"
                progress(so_far, started, done=n == len(pairs))
    return results, faults


def missing_folder(root: str, folder: str) -> str:
    """The sentence about a folder that a data set should have. root may be too high above a data
    set, too deep in it, or the other release of ADE20K."""
    if isdir(f"{root}/images/ADE") or exists(f"{root}/index_ade20k.pkl"):
        return (
            f"{root}: this is the full ADE20K release of 2021, with other labels than the "
            "challenge set of 2016 that the recipes use; "
            "`python ade20k.py download data/ade` fetches that one (1 GB)"
        )

    names = []
    if isdir(root):
        names = [*sorted(os.listdir(root)), "..", "../.."]
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


def label_warnings(pairs: list[Pair], classes: Classes, most: int = 300) -> list[str]:
    """class_warnings of the label files, or of `most` spread evenly over them (a second's work)."""
    step = max(1, len(pairs) // most)
    some = pairs[::step][:most]

    def read(_: str, label_path: str) -> ndarray:
        return count_labels(load_label(label_path, classes))

    counts, faults = read_all(read, some)
    if faults:
        raise DataError(faults[0])
    return class_warnings(np.array(counts), classes, len(pairs))


def count_labels(label: ndarray) -> ndarray:
    """-> (256,), how many pixels have each label"""
    return np.bincount(label.ravel(), minlength=256)


def class_warnings(counts: ndarray, classes: Classes, total: int) -> list[str]:
    """What no training can learn from these labels, in sentences. counts: (n, 256), the pixels of
    each label in n of `total` label files."""
    seen, count = len(counts), len(classes.names)
    pixels = counts.sum(axis=0)
    missing = [name for name, n in zip(classes.names, pixels) if n == 0]
    warnings = []

    # Rare classes may well be absent from a part of a large set; many of them is another matter.
    if missing and (seen == total or len(missing) > count / 3):
        warnings.append(
            f"{len(missing)} of {count} classes are in none of the training labels "
            f"({seen} of {total} files were looked at): {listed(missing)}"
        )
    if len(missing) > count - 2:
        warnings.append("with fewer than two classes in the labels there is nothing to learn")
    return warnings


def listed(texts: list[str], separator: str = ", ") -> str:
    """All of them, or the first twenty and how many more there are."""
    shown = texts[:20]
    if len(texts) > 20:
        shown.append(f"and {len(texts) - 20} more")
    return separator.join(shown)


# ---- the toy data set ----------------------------------------------------------------------------

# Outdoor scenes drawn by code, to try everything before the real download. A scene is a small world
# in metres: x to the right, y up, z ahead, the ground at y = 0, the eye at (0, EYE, 0), looking
# along z. By similar triangles the point (x, y, z) appears at
#
#     column = WIDTH / 2 + FOCAL * x / z          row = HORIZON + FOCAL * (EYE - y) / z
#
# on a canvas twice as large as the picture, which is shrunk in the end to make edges smooth.
HEIGHT, WIDTH, FOCAL, HORIZON, EYE = 384, 512, 440, 160, 4

# classes.txt, with ADE20K's names and colours. A label file holds the number of the line: 0 is not
# labelled, 1 is building.
TOY_CLASSES = """\
ignore 0
building 180 120 120
sky 6 230 230
tree 4 200 3
road 140 140 140
grass 4 250 7
sidewalk 235 255 7
person 150 5 61
mountain 143 255 140
car 0 102 200
house 255 9 224
sea 9 7 230
sand 160 150 20
boat 173 255 0
"""

# The things, a shape a line, from back to front. First the thing, then the colour of the shape (?:
# one of BRIGHT, by chance; shadow: it darkens what is there), then the corners of a polygon: x,y or
# x,y,z in metres from the place where the thing stands. Two corners, upper left and lower right,
# make an ellipse.
THINGS = """
mountain 128,134,156 -110,0 -82,33 -50,55 -22,93 0,110 90,0
mountain 88,94,122 20,0 10,60 0,68 33,110 110,0
mountain 246,248,252 0,110 -22,93 -9,80 2,88 24,80
hill 112,148,66 -80,0 -62,4 -40,9 -18,11.6 6,12 30,9.5 52,4.5 75,0
hill 74,120,56 -34,5 -22,9 -8,11 4,11.4 -6,8 -20,5
left 190,156,138 0,0,-12 0,10,-12 -30,10,-12 -30,0,-12
left 164,132,118 0,0 0,10 0,10,-12 0,0,-12
left 84,112,134 0,7 0,8.6 0,8.6,-11 0,7,-11
left 84,112,134 0,4 0,5.6 0,5.6,-11 0,4,-11
left 84,112,134 0,0.4 0,2.4 0,2.4,-11 0,0.4,-11
left 164,132,118 0,0,-3.6 0,9,-3.6 0,9,-4.2 0,0,-4.2
left 164,132,118 0,0,-7.6 0,9,-7.6 0,9,-8.2 0,0,-8.2
right 190,156,138 0,0,-12 0,10,-12 30,10,-12 30,0,-12
right 164,132,118 0,0 0,10 0,10,-12 0,0,-12
right 84,112,134 0,7 0,8.6 0,8.6,-11 0,7,-11
right 84,112,134 0,4 0,5.6 0,5.6,-11 0,4,-11
right 84,112,134 0,0.4 0,2.4 0,2.4,-11 0,0.4,-11
right 164,132,118 0,0,-3.6 0,9,-3.6 0,9,-4.2 0,0,-4.2
right 164,132,118 0,0,-7.6 0,9,-7.6 0,9,-8.2 0,0,-8.2
house shadow -5.8,0.35 5.8,-0.35
house 178,172,172 -2,0 -2,2.8 5,2.8 5,0
house 236,228,212 -5,0 -5,2.8 -3.5,4.8 -2,2.8 -2,0
house 172,70,52 -3.6,4.9 3.5,4.9 5.4,2.6 -1.9,2.6
house 84,112,134 -0.5,0.9 1,0.9 1,2.1 -0.5,2.1
house 84,112,134 2.5,0.9 4,0.9 4,2.1 2.5,2.1
house 104,74,54 -4,0 -4,2 -3,2 -3,0
barn shadow -5.8,0.35 5.8,-0.35
barn 190,156,138 2,0 2,2.8 -5,2.8 -5,0
barn 164,132,118 5,0 5,2.8 3.5,4.8 2,2.8 2,0
barn 84,86,92 3.6,4.9 -3.5,4.9 -5.4,2.6 1.9,2.6
barn 104,74,54 -0.5,0 -0.5,2.2 -3,2.2 -3,0
tree shadow -1.8,0.35 1.8,-0.35
tree 104,74,54 -0.2,0 0.2,0 0.1,3 -0.1,3
tree 50,90,48 -1.3,4 1.9,1.7
tree 50,90,48 -1.5,5 1.3,2.4
tree 74,120,56 -1.6,3.8 0.4,2.1
tree 74,120,56 -0.9,4.9 0.7,3.2
tree 74,120,56 0.2,3.7 1.5,2.6
tree 112,148,66 -1.2,4.3 -0.1,3.2
fir shadow -1.3,0.3 1.3,-0.3
fir 50,90,48 -1.1,0.4 -0.5,1.8 -0.8,1.8 -0.3,3 -0.5,3 0,4.4 0.5,3 0.3,3 0.8,1.8 0.5,1.8 1.1,0.4
fir 74,120,56 -1.1,0.4 -0.5,1.8 -0.8,1.8 -0.3,3 -0.5,3 0,4.4 -0.2,0.3
car shadow -1.4,0.35 1.4,-0.35
car 36,38,46 -0.85,0.6 -0.4,0
car 36,38,46 0.4,0.6 0.85,0
car ? -1,0.3 -1,0.9 -0.7,1.5 0.7,1.5 1,0.9 1,0.3
car 84,112,134 -0.75,0.95 -0.55,1.4 0.55,1.4 0.75,0.95
car 172,70,52 -0.95,0.6 -0.95,0.8 -0.65,0.8 -0.65,0.6
car 172,70,52 0.95,0.6 0.95,0.8 0.65,0.8 0.65,0.6
person shadow -0.7,0.2 0.7,-0.2
person 36,38,46 -0.3,0 -0.02,0 0.02,0 0.3,0 0.3,1.2 -0.3,1.2
person ? -0.48,1 -0.36,1.85 0.36,1.85 0.48,1
person 226,178,146 -0.22,2.3 0.22,1.84
person 104,74,54 -0.22,2.35 0.22,2.1
boat shadow -3.4,0.4 3.4,-0.4
boat 104,74,54 -0.1,0.5 -0.1,7 0.1,7 0.1,0.5
boat 236,228,212 -0.2,1.2 -0.2,6.8 -2.6,1.2
boat ? 0.2,1.4 0.2,6.2 2.2,1.4
boat 172,70,52 -2.6,0 -3,1 3.2,1 2.4,0
lamp shadow -0.35,0.12 0.35,-0.12
lamp 36,38,46 -0.1,0 -0.1,5 0.1,5 0.1,0
lamp 36,38,46 -0.8,4.9 -0.8,5.1 0.8,5.1 0.8,4.9
balloon shadow -3,0.5 3,-0.5
balloon 104,74,54 -0.7,12.1 -0.7,13.3 0.7,13.3 0.7,12.1
balloon ? -1,14.2 -3,17 3,17 1,14.2
balloon ? -3.2,21 3.2,15
parasol shadow -1.6,0.35 1.6,-0.35
parasol 104,74,54 -0.06,0 -0.06,2.2 0.06,2.2 0.06,0
parasol ? -1.5,1.8 -0.8,2.4 0,2.6 0.8,2.4 1.5,1.8
"""
BRIGHT = "206,62,54 240,184,60 52,104,176 238,236,228 224,112,158 60,150,140".split()

# The scenes. First the ground from left to right: class, colour, and the x where it begins. Then
# what stands on it: thing, class, how many at most, and the two z,x between which each stands. The
# scene decides what a shape is: the same house is a building where it stands in a street.
SCENES = ["""
sidewalk 178,172,172 -1e9
sidewalk 236,228,212 -3.8
road 84,86,92 -3.5
road 236,228,212 -0.08
road 84,86,92 0.08
sidewalk 236,228,212 3.5
sidewalk 178,172,172 3.8

mountain mountain 3 500,-250 600,250
left building 3 16,-8 40,-7
left building 5 40,-8 110,-7
right building 3 16,7 40,8
right building 5 40,7 110,8
house building 2 16,12 60,14
tree tree 2 9,-6 25,-5
tree tree 3 25,-6 80,-5
tree tree 2 9,5 25,6
tree tree 3 25,5 80,6
lamp ignore 1 9,-4 40,-4
lamp ignore 1 9,4 40,4
car car 2 8,-2.2 18,-1.3
car car 2 18,-2.2 50,-1.3
car car 2 8,1.3 18,2.2
car car 2 18,1.3 50,2.2
person person 2 7.5,-5.5 14,-4.3
person person 2 14,-6.5 40,-4.3
person person 2 7.5,4.3 14,5.5
person person 2 14,4.3 40,6.5
""", """
grass 112,148,66 -1e9
road 84,86,92 -2.5
road 236,228,212 -0.08
road 84,86,92 0.08
grass 112,148,66 2.5

mountain mountain 4 500,-300 600,300
hill mountain 5 120,-99 200,99
house house 3 16,-18 60,-8
barn house 3 16,8 60,18
car car 2 8,-1.2 18,-0.8
car car 2 14,0.8 50,1.2
tree tree 4 12,-16 40,-5
tree tree 4 40,-50 120,-5
fir tree 4 12,4 40,16
fir tree 5 40,4 120,60
balloon ignore 1 50,-20 80,20
""", """
grass 112,148,66 -1e9
road 228,202,148 -1.6
grass 112,148,66 1.6

hill mountain 6 120,-99 200,99
barn house 3 16,-18 60,-7
house house 3 16,7 60,18
person person 3 7,-1.5 14,1.5
person person 2 14,-1.5 40,1.5
tree tree 4 10,-16 40,-3
tree tree 4 40,-50 120,-4
tree tree 4 10,3 40,16
fir tree 4 40,4 120,50
balloon ignore 1 50,-20 80,20
""", """
sea 44,116,138 -1e9
sea 236,228,212 -3.5
sand 190,160,116 -3
sand 228,202,148 -2
grass 112,148,66 6

mountain mountain 3 450,-300 600,100
boat boat 3 15,-16 35,-8
boat boat 3 35,-40 120,-10
house house 3 18,12 50,18
person person 3 7.5,-2 14,3
person person 3 14,-2 40,5
tree tree 3 12,8 30,16
tree tree 4 30,8 90,40
parasol ignore 2 12,-1 30,5
""", """
sea 44,116,138 -1e9
sidewalk 178,172,172 -6
road 84,86,92 -2.5
sidewalk 178,172,172 2.5

hill mountain 3 200,-150 300,-20
boat boat 3 15,-16 35,-9
boat boat 3 35,-40 120,-10
right building 3 16,7 40,8
right building 5 40,7 110,8
car car 2 8,-1.5 18,1.5
car car 2 18,-1.5 50,1.5
person person 3 8,-5 14,-3
person person 2 14,-5.5 40,-3
tree tree 4 10,4 60,5
lamp ignore 2 9,-5.8 40,-5.8
"""]

# The lights: what all colours are multiplied by, the sky above, the colour of everything far away,
# the metres of air after which 1 / e of a colour is left, and how dark shadows are.
LIGHTS = """
1.06,1.03,0.97 62,124,211 186,216,236 500 0.5
1.14,0.93,0.70 90,130,240 255,208,150 400 0.5
0.86,0.90,0.94 160,170,178 206,212,216 300 0.2
0.90,0.92,0.92 195,206,215 212,218,220 220 0.1
"""


def draw_scene(rng: Generator) -> tuple[ndarray, ndarray]:
    """One scene: a picture (192, 256, 3) uint8 RGB and its label (192, 256) uint8, as label files
    have it."""
    ground, crowds = rng.choice(SCENES).split("\n\n")
    sun, zenith, haze, air, shadow = map(numbers, rng.choice(rows(LIGHTS)))
    bend = rng.uniform(-0.006, 0.006)  # x = 0 of the tables lies at bend * z^2, up to z = 60

    def in_haze(colour, z):  # what is left of a colour behind so many metres of air
        return haze + (colour - haze) * np.exp(-z / air)

    image, label, distance = draw_ground(rows(ground), zenith, bend, rng)
    canvas = Image.fromarray(in_haze(sun * image, distance).clip(0, 255).astype(np.uint8))
    labels = Image.fromarray(label)
    shade = Image.new("L", canvas.size)

    # The things: count times, each is there with a chance of 0.8. From far to near they are drawn
    # into the picture and the label alike, and hide the shadows behind them.
    places = [
        (*rng.uniform(*map(numbers, between)), thing, name)
        for thing, name, count, *between in rows(crowds)
        for _ in range(rng.binomial(int(count), 0.8))
    ]
    for z, x, thing, name in sorted(places, reverse=True):
        place = x + bend * min(z, 60) ** 2, 0, z
        size, tint = rng.uniform(0.85, 1.15, (2, 3))

        for owner, colour, *corners in rows(THINGS):
            if owner == thing:
                # (n, 3): the 0 is the z of corners that have only two numbers.
                corners = place + size * [numbers(corner + ",0")[:3] for corner in corners]
                draw(shade, corners, 255 if colour == "shadow" else 0)
                if colour != "shadow":
                    colour = sun * tint * numbers(rng.choice(BRIGHT) if colour == "?" else colour)
                    draw(canvas, corners, tuple(in_haze(colour, z).astype(int)))
                    draw(labels, corners, label_value(name))

    # Of 2 x 2 pixels the picture takes the mean, the label the first. Shadows have soft edges, and
    # a camera adds noise.
    dark = shadow / 255 * gaussian_filter(np.asarray(shade.reduce(2)), 2)[:, :, None]
    image = np.asarray(canvas.reduce(2)) * (1 - dark) + 4 * rng.standard_normal((192, 256, 3))
    return image.clip(0, 255).astype(np.uint8), np.asarray(labels)[::2, ::2]


def draw_ground(
    strips: list, zenith: ndarray, bend: float, rng: Generator
) -> tuple[ndarray, ndarray, ndarray]:
    """Sky and ground: the picture (HEIGHT, WIDTH, 3), 0 to 255, the label (HEIGHT, WIDTH), and how
    many metres away each pixel is (HEIGHT, WIDTH, 1)."""
    names, colours, edges = zip(*strips)  # the edges are the x where strips begin
    values = np.array([*map(label_value, ("sky", *names))], np.uint8)
    colours = np.array([zenith, *map(numbers, colours)])

    # The projection inverted for y = 0: the place on the ground that each pixel shows. The sky is
    # the same plane upside down. Only its haze is that of a plane six times as far away.
    row, column, _ = np.mgrid[:HEIGHT, :WIDTH, :1] + 0.5  # (HEIGHT, WIDTH, 1)
    sky = row < HORIZON
    z = FOCAL * EYE / abs(row - HORIZON)
    x = (column - WIDTH / 2) * z / FOCAL - bend * np.minimum(z, 60) ** 2
    part = (np.searchsorted(np.array(edges, float), x) * ~sky)[:, :, 0]  # 0: the sky

    # Noise that is smoothed a little makes rough ground. Smoothed much, it makes clouds. Its cells
    # are a tenth of a metre wide, and it repeats itself.
    noise = rng.standard_normal((256, 256))
    at = np.int_(10 * z) % 256, np.int_(10 * x) % 256
    grain = gaussian_filter(noise, 1, mode="wrap")[at]
    cloud = gaussian_filter(noise, 8, mode="wrap")[at] * 14 + rng.uniform(-0.6, 0.4)
    image = colours[part] * (1 + 0.2 * grain)
    image += sky * cloud.clip(0, 0.9) * (245 - image)
    return image, values[part], z * (1 + 5 * sky)


def draw(canvas: Image.Image, corners: ndarray, fill: int | tuple) -> None:
    """Fill the polygon with these corners, (n, 3), or the ellipse between two of them."""
    x, y, z = corners.T
    points = list(zip(WIDTH / 2 + FOCAL * x / z, HORIZON + FOCAL * (EYE - y) / z))

    pen = ImageDraw.Draw(canvas)
    shape = pen.ellipse if len(corners) == 2 else pen.polygon
    shape(points, fill)


def label_value(name: str) -> int:
    """What label files hold for a class: the number of its line in TOY_CLASSES."""
    return [line[0] for line in rows(TOY_CLASSES)].index(name)


def rows(table: str) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in table.strip().splitlines()]


def numbers(text: str) -> ndarray:
    """ "1,2.5" -> array([1, 2.5]) """
    return np.array(text.split(","), float)


def data_root(name: str) -> str:
    """The folder that --data means: `toy` is drawn where it is missing, everything else is a
    path."""
    return make_toy("data/toy") if name == "toy" else name


def make_toy(root: str) -> str:
    """Draw 96 training and 24 validation pictures in ADE20K's layout, with a classes.txt of their
    own, in root; where root exists, leave it. -> root"""
    if exists(root):
        if not exists(join(root, "classes.txt")):
            raise DataError(f"{root}: has no classes.txt, as older toy sets: remove it, run again")
        return root

    part = f"{os.path.normpath(root)}.part{os.getpid()}"  # moved into place when whole
    for i in range(120):
        split = "training" if i < 96 else "validation"
        image, label = draw_scene(default_rng([1831, i]))  # which has all scenes about as often
        for kind, pixels, end in (("images", image, "jpg"), ("annotations", label, "png")):
            path = f"{part}/{kind}/{split}/toy_{i % 96:03d}.{end}"
            os.makedirs(dirname(path), exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)

    Path(part, "classes.txt").write_text(TOY_CLASSES)
    try:
        os.rename(part, root)
    except OSError:  # another process was faster, with the same pictures
        shutil.rmtree(part)
        if not exists(root):
            raise
    return root


# ---- fetching ------------------------------------------------------------------------------------

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"  # as it stands in public scripts; 922 MB


def fetch(url: str, path: str, sha: str = "", attempts: int = 5, timeout: float = 60) -> None:
    """Download url to path: to path.part first, resumed after a break, moved into place once it is
    whole.

    sha: the start of the file's sha1 or, if that is not 40 digits long, of its sha256. timeout:
    seconds without a byte that count as a break. OSError or ValueError if the file cannot be had
    whole or has another hash (then the part is deleted)."""
    part = path + ".part"
    os.makedirs(dirname(path) or ".", exist_ok=True)

    for attempt in range(attempts):
        time.sleep(attempt)
        try:
            fetch_rest(url, part, timeout)
            break
        except HTTPError as error:
            if error.code != 416:
                raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
            have = getsize(part)
            os.remove(part)
            problem = f"the server has nothing after the {have} bytes of {part}, which is deleted"
        except (OSError, HTTPException) as error:
            problem = str(error) or type(error).__name__
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


def fetch_rest(url: str, part: str, timeout: float) -> None:
    """Append to part what it lacks of url; OSError or HTTPException where that breaks off."""
    have = getsize(part) if exists(part) else 0
    request = Request(url, headers={"User-Agent": "python"})
    if have:
        request.add_header("Range", f"bytes={have}-")

    started = time.monotonic()
    with urlopen(request, timeout=timeout) as answer, open(part, "ab") as file:
        if answer.status != 206:  # 200: the server knows no ranges, and sends all of it
            have = file.truncate(0)
        length = answer.headers.get("Content-Length")  # not every server tells
        total = have + int(length or 0)

        while block := answer.read1(1 << 20):  # (read would lose what came before a break)
            file.write(block)
            have += len(block)
            megabytes = f"{have // 10**6} of {total // 10**6} MB"
            progress(f"{part}: {megabytes}", started)

    have = getsize(part)  # (more than it should be if another process fetches too)
    if length and have != total:
        raise OSError(f"the server broke off after {have} of {total} bytes")


def one_line(text: str) -> str:
    """A text from elsewhere, as a terminal may print it: names in files may hold line breaks, and
    codes that clear the screen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def progress(text: str, started: float, done: bool = False) -> None:
    """On a terminal one line that whatever comes next is written over, and that an empty text
    clears; elsewhere only its last state."""
    if text:
        text += f", {time.monotonic() - started:.0f} s"
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="\n" if done else "\r", file=sys.stderr, flush=True)
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
    read = partial(read_sample, classes=classes)
    total = 0
    for split in ("training", "validation"):
        if split == "validation" and not has_split(root, split):
            print("validation: none, training goes without")
            break

        pairs, faults = scan(root, split)
        samples, more = read_all(read, pairs, split)
        faults += more
        print(f"{split}: {len(samples)} good pictures, {len(faults)} faults")
        if samples:
            print_contents(samples, split, classes)
        for fault in faults:
            print(f"  FAULT {one_line(fault)}")
        total += len(faults)

    return total


def read_sample(image_path: str, label_path: str, classes: Classes) -> tuple:
    """Read one sample whole. -> (H, W), (256,) pixels of each label"""
    _, label = load(image_path, label_path, classes)
    return label.shape, count_labels(label)


def print_contents(samples: list[tuple], split: str, classes: Classes) -> None:
    """samples: read_sample of each picture."""
    sizes, counts = (np.array(x) for x in zip(*samples))  # (n, 2), (n, 256)

    h0, w0 = sizes.min(axis=0)
    h1, w1 = sizes.max(axis=0)
    pictures = (counts > 0).sum(axis=0)  # (256,), how many hold each label
    pixels = counts.sum(axis=0)  # (256,)
    share = pixels / pixels.sum()
    order = np.argsort(-share[:IGNORE_INDEX])
    present = [k for k in order if share[k]]

    print(
        f"  height {h0} to {h1}, width {w0} to {w1}; {share[IGNORE_INDEX]:.1%} of the pixels "
        f"unlabelled; {len(present)} of {len(classes.names)} classes:"
    )
    for k in present:
        name = classes.names[k]
        print(f"    {name:20s} {share[k]:7.2%} of the pixels, {pictures[k]:6d} pictures")

    if split == "training":
        for warning in class_warnings(counts, classes, len(counts)):
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

    with errors_in_one_sentence():
        if args.action == "check":
            sys.exit(1 if check(args.dir) else 0)
        make = download if args.action == "download" else make_toy
        print(make(args.dir))


if __name__ == "__main__":
    main()
