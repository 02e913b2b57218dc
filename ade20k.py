"""The data: classes, the samples of a run, the transforms; reading and checking of files.

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
import importlib.util
import os
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from os.path import dirname, exists, isdir, join, lexists, splitext
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator, default_rng
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from upernet import IGNORE_INDEX

DEFAULT_ROOT = "data/ade/ADEChallengeData2016"

Pair = tuple[str, str]  # the paths of a picture and of its label file


# ---- classes -------------------------------------------------------------------------------------

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


class Classes(NamedTuple):
    """What the labels of a data set mean."""

    names: tuple[str, ...] = CLASSES
    palette: list[list[int]] = PALETTE.tolist()  # [R, G, B] of each, 0..255

    # In ADE20K's label files 0 means "not labelled", and k is class k - 1. Without zero_ignored k
    # is class k, and 255 means "not labelled".
    zero_ignored: bool = True

    # A list: the label files hold the colours of the palette, and those of the list mean "not
    # labelled". None: they hold numbers.
    ignored_colours: list[list[int]] | None = None


# ---- samples -------------------------------------------------------------------------------------


@dataclass
class TrainSet(torch.utils.data.Dataset):
    """Sample number `position` of the run: (seed, position) decide which picture it is, and how it
    is cut and distorted. So a run does not depend on the number of workers and processes, and one
    resumed at iteration i continues at once with the samples it would have seen."""

    pairs: list[Pair]
    seed: int
    crop: int = 512
    short: int = 512
    classes: Classes = Classes()

    def paths(self, position: int) -> Pair:
        """The picture and its label file. Every pass over the data has an order of its own."""
        epoch, i = divmod(position, len(self.pairs))
        rng = default_rng([self.seed, epoch, 0])
        return self.pairs[rng.permutation(len(self.pairs))[i]]

    def __getitem__(self, position: int) -> tuple:
        """-> image (3, S, S) uint8, label (S, S) uint8, size (2,) before padding"""
        try:
            image, label = load(*self.paths(position), self.classes)
        except DataError as fault:
            raise DataError(f"{fault}; `python ade20k.py check DIR` names all faults") from fault

        rng = default_rng([self.seed, position, 1])
        sample = train_transform(image, label, rng, self.crop, self.short)
        return tuple(map(torch.as_tensor, sample))


def positions(
    start: int, iters: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """Iteration i takes the positions i * batch to (i + 1) * batch - 1. Yields, for each iteration
    from start on, the equal part of them that one process takes."""
    count = batch // world
    for i in range(start, iters):
        first = i * batch + rank * count
        yield list(range(first, first + count))


# ---- transforms ----------------------------------------------------------------------------------


def train_transform(
    image: ndarray, label: ndarray, rng: Generator, crop: int = 512, short: int = 512
) -> tuple:
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
    label = label[nearest_indices(H, h)][:, nearest_indices(W, w)]  # (h, w)

    # Of the image only the part inside the crop is resized.
    label, y, x = random_crop(label, crop, rng)
    height, width = label.shape  # crop, or less where the picture is smaller
    box = (y, x, y + height, x + width)
    image = resize_bilinear(image, h, w, box)  # (3, height, width)

    if rng.random() < 0.5:
        image = image[:, :, ::-1]
        label = label[:, ::-1]
    image = distort(image, rng)

    pad = [(0, crop - height), (0, crop - width)]
    image = np.pad(image, [(0, 0), *pad])  # (3, crop, crop)
    label = np.pad(label, pad, constant_values=IGNORE_INDEX)  # (crop, crop)
    return image, label, (height, width)


def random_crop(label: ndarray, crop: int, rng: Generator) -> tuple:
    """label (H, W) -> a crop of it, and its upper left corner y, x. A crop in which one class
    covers 75% or more of the labelled pixels teaches little: it is redrawn, at most ten times."""
    h, w = label.shape
    for _ in range(11):
        y = rng.integers(max(h - crop, 0) + 1)
        x = rng.integers(max(w - crop, 0) + 1)
        cropped = label[y : y + crop, x : x + crop]

        histogram = Image.fromarray(cropped).histogram()  # (bincount takes twice as long)
        pixels = histogram[:IGNORE_INDEX]  # of each class
        if max(pixels) < 0.75 * sum(pixels):
            break
    return cropped, y, x


def scaled_size(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The largest (h, w) of the same aspect with long side <= long, short side <= short, as
    mmcv.rescale_size; at least 1."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def nearest_indices(old: int, new: int) -> ndarray:
    """The source index of each of `new` pixels, as cv2's INTER_NEAREST: floor(i * old / new), not
    the pixel's centre."""
    index = np.arange(new) * (1 / (new / old))  # cv2's old / new, with its last bit
    return np.minimum(index.astype(np.int64), old - 1)


def resize_bilinear(image: ndarray, h: int, w: int, box: tuple | None = None) -> ndarray:
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
    image = image[first:end].transpose(2, 0, 1)  # (3, n, W)
    image = image.astype(np.float32, order="C")
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

    # before + (after - before) * weight, in place, because new memory costs more than the sums.
    # mode="clip": beyond the border its last pixel is repeated.
    before = x.take(index, axis, mode="clip")
    after = x.take(index + 1, axis, mode="clip")
    after -= before
    after *= weight
    after += before
    return after


def distort(image: ndarray, rng: Generator) -> ndarray:
    """Photometric distortion of (3, H, W) uint8 (SSD, Liu et al. 2016, arXiv:1512.02325, section
    2.2): brightness, contrast, saturation, hue, each with probability 1/2. A coin decides whether
    contrast comes second or last."""
    if rng.integers(2):
        image = scale_levels(image, 1, rng.uniform(-32, 32))

    contrast_second = rng.integers(2)
    if contrast_second and rng.integers(2):
        image = scale_levels(image, rng.uniform(0.5, 1.5))

    if rng.integers(2):
        hue, saturation, value = rgb_to_hsv(image)
        saturation = scale_levels(saturation, rng.uniform(0.5, 1.5))
        image = hsv_to_rgb(hue, saturation, value)

    if rng.integers(2):
        hue, saturation, value = rgb_to_hsv(image)
        turned = (np.arange(180) + rng.integers(-18, 18)) % 180  # of each hue: `%` is slow
        image = hsv_to_rgb(turned.take(hue), saturation, value)

    if not contrast_second and rng.integers(2):
        image = scale_levels(image, rng.uniform(0.5, 1.5))
    return image


def scale_levels(x: ndarray, factor: float, offset: float = 0) -> ndarray:
    """x * factor + offset, clipped to 0..255 and truncated, uint8."""
    x = x.astype(np.float32) * factor + offset
    return np.clip(x, 0, 255).astype(np.uint8)


# ImageNet's, RGB. The reference uses them for ViT-B too, although its weights were pretrained with
# 127.5 / 127.5.
MEAN, STD = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).view(2, 3, 1, 1)


def normalise(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 -> (x - mean) / std, float32, on the images' device; 0 outside each
    picture's (h, w) in sizes (B, 2), where the picture was padded."""
    # (A copy that blocks would wait for all that the GPU has still to do.)
    device = images.device
    x = images.float() - MEAN.to(device, non_blocking=True)
    x = x / STD.to(device, non_blocking=True)
    if sizes is None:
        return x

    h, w = sizes.T[..., None, None, None]  # each (B, 1, 1, 1)
    in_rows = torch.arange(x.shape[2], device=device)[:, None] < h  # (B, 1, H, 1)
    in_columns = torch.arange(x.shape[3], device=device) < w  # (B, 1, 1, W)
    return x * (in_rows & in_columns)


# ---- HSV, as the reference's cv2 rounds it -------------------------------------------------------

# cv2 has HSV in uint8: hue 0..179 (2 degrees a step), saturation and value 0..255. The rounding is
# part of the recipe, since hue and saturation distortion see the picture through it. If you take it
# on trust that both functions equal cv2's, continue with the next part.


def fixed_point(numerator: int) -> ndarray:
    """numerator / n for n = 0..255 (0 for n = 0) in 20.12 fixed point: cv2 divides by table."""
    quotients = np.append(0, (numerator << 12) / np.arange(1.0, 256))
    return np.rint(quotients).astype(np.int32)


HUE_STEP = fixed_point(30)  # 30 / spread: a sixth of the circle is 30 steps
SATURATION_STEP = fixed_point(255)  # 255 / value


def rgb_to_hsv(image: ndarray) -> tuple:
    """(3, H, W) uint8 -> hue (H, W) 0..179, saturation 0..255, value 0..255, integers, equal to
    cv2's."""
    rgb = image.astype(np.int16)
    r, g, b = rgb
    value = rgb.max(axis=0)
    spread = value - rgb.min(axis=0)

    # Around the largest channel: red stands at 0, green at 60, blue at 120.
    hue = np.where(value == g, b - r + 2 * spread, r - g + 4 * spread)
    hue = np.where(value == r, g - b, hue)

    saturation = spread * SATURATION_STEP.take(value, mode="clip")
    hue = hue * HUE_STEP.take(spread, mode="clip")
    for x in (saturation, hue):
        x += 1 << 11  # so that the shift rounds
        x >>= 12
    hue[hue < 0] += 180
    return hue.astype(np.intp), saturation, value  # (hue: an index)


# Back to RGB (Smith 1978, "Color gamut transform pairs"): channel = value * (1 - saturation *
# fade(hue)). fade is 0 over the two of six sectors where the channel dominates (R around hue 0, G
# around 60, B around 120), 1 opposite, a ramp between. Rounded to float32 as in cv2's vector code,
# so that the truncation at the end meets the same numbers.
SECTOR = np.float32(np.arange(180)) * (6 / 180)  # 0..6
PLACE = (np.float64(SECTOR) + [[5], [3], [1]]) % 6  # (3, 180): of R, G, B
RAMP = np.minimum(PLACE, 4 - PLACE).clip(0, 1)
FADE = np.float64(np.float32(RAMP))


def hsv_to_rgb(hue: ndarray, saturation: ndarray, value: ndarray) -> ndarray:
    """The inverse of rgb_to_hsv, truncated, equal to what cv2 computes in vectors (ends of rows it
    rounds). -> (3, H, W) uint8"""
    value = np.float32(value) * (1 / 255)
    saturation = np.float64(np.float32(saturation) * (1 / 255))

    image = np.empty((3, *hue.shape), np.uint8)
    for channel, fade in zip(image, FADE):
        # float64 up to the bracket's end, rounded once: cv2 uses a fused multiply-add there. In
        # place, because new memory costs more than the sums.
        x = fade.take(hue)
        x *= saturation
        x = np.float32(1 - x)
        x *= value
        x *= 255
        channel[:] = x
    return image


# ---- reading -------------------------------------------------------------------------------------

# The formats of label files, which keep every value. (TIFF does so in most compressions.)
LOSSLESS = ("PNG", "BMP", "TIFF")

# Pillow refuses a png with more than 1 MB of text; accept it up to 16 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 24


class UserError(Exception):
    """An error that the user can mend, in one sentence: the file or option, its value, the way
    out."""


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


def load(image_path: str, label_path: str | None, classes: Classes = Classes()) -> tuple:
    """load_image and load_label of one sample; DataError if their sizes differ. The label is None
    where there is no label file."""
    image = load_image(image_path)
    if label_path is None:
        return image, None

    label = load_label(label_path, classes)
    if label.shape != image.shape[:2]:
        raise DataError(
            f"{image_path}: the picture has height and width {image.shape[:2]}, its label file "
            f"{label.shape}, they must be equal"
        )
    return image, label


def load_image(path: str) -> ndarray:
    """Any picture Pillow can read -> (H, W, 3) uint8 RGB, upright. DataError if it cannot be read.

    Grey is repeated, alpha dropped, 16 bits are cut to the upper 8, EXIF rotation is applied: as
    cv2.imread does it."""
    with about(f"{path}: cannot be read as a picture"):
        try:
            picture = Image.open(path)
        except Image.DecompressionBombError as error:
            raise ValueError("has more than 178 million pixels, cut it into tiles") from error

        # A file that is cut short ends it here. A broken EXIF block does not: exif_transpose turns
        # the pixels before it raises an error.
        picture.load()
        with suppress(Exception):
            ImageOps.exif_transpose(picture, in_place=True)

        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scale
            upper = (np.asarray(picture) >> 8).clip(0, 255)
            picture = Image.fromarray(upper.astype(np.uint8))
        return np.asarray(picture.convert("RGB"))


def load_label(path: str, classes: Classes = Classes()) -> ndarray:
    """A label file -> (H, W) uint8, 0..C-1, or 255 where there is no label.

    The file has one channel of 1, 8 or 16 bits (of a palette, the indices), or the classes'
    colours. DataError if its format may have changed labels, or it holds a value or a colour that
    is no class."""
    with about(path), Image.open(path) as file:
        compression = file.info.get("compression")  # of a TIFF
        if file.format not in LOSSLESS or compression in ("jpeg", "tiff_jpeg", "webp"):
            raise ValueError(f"is a {file.format} file that may change labels, save them as png")
        if re.search("L;[24]", str(file.tile)):
            raise ValueError("is grey of 2 or 4 bits, which Pillow stretches: save it with 8")

        if classes.ignored_colours is None:
            values = np.asarray(file)
            label = label_of_numbers(values, classes)
        elif ";16" in str(file.tile):
            raise ValueError("has 16 bits a colour, those in classes.txt have 8: save it with 8")
        else:
            values = np.asarray(file.convert("RGB"))
            label = label_of_colours(values, classes)

        wrong = values[label < 0]
        if wrong.size:
            raise ValueError(
                f"holds {wrong[0]}, which is neither a class nor ignored; classes.txt says what "
                "labels mean"
            )
        return label.astype(np.uint8)


def label_of_numbers(values: ndarray, classes: Classes) -> ndarray:
    """(H, W), 1 to 16 bits -> (H, W) int16 0..C-1, 255, or -1 where a value has no meaning"""
    if values.ndim != 2:
        raise ValueError(
            "labels must be one channel of numbers; for colours, begin classes.txt with a line "
            "`colours`"
        )

    # Labels are shifted here, and back only where evaluate.py saves predictions as label files.
    first, unlabelled = (1, 0) if classes.zero_ignored else (0, IGNORE_INDEX)
    count = len(classes.names)
    table = np.full(1 << 16, -1, np.int16)  # what each value of a file means
    table[first : first + count] = range(count)
    table[unlabelled] = IGNORE_INDEX
    return table.take(values)


def label_of_colours(rgb: ndarray, classes: Classes) -> ndarray:
    """(H, W, 3) uint8 -> (H, W) integers 0..C-1, 255, or -1 where a colour has no meaning"""
    pixels = rgb @ [1 << 16, 1 << 8, 1]  # (H, W), a colour as one number
    label = np.full(pixels.shape, -1)
    for k, colour in enumerate(classes.palette + classes.ignored_colours):
        label[pixels == int.from_bytes(colour)] = k
    label[label >= len(classes.palette)] = IGNORE_INDEX
    return label


def read_classes(root: str) -> Classes:
    """The classes of ROOT/classes.txt, or ADE20K's where there is no such file.

    One name a line, with `R G B` behind it or without; # begins a comment. The first line may be
    `ignore 0` (see zero_ignored), `ignore 255`, or `colours` (see ignored_colours): then each name
    has its colour, and lines `ignore R G B` name colours of unlabelled pixels. DataError with the
    line that cannot be used."""
    path = join(root, "classes.txt")
    if not lexists(path):
        return Classes()

    names, palette, zero_ignored, ignored = [], [], False, None
    with about(path), open(path, encoding="utf-8-sig") as file:
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in file]
        for line in filter(None, lines):
            with about(repr(line)):
                name, rgb = re.fullmatch(r"(.*?)((?:\s+\d+){3})?", line).groups("")
                colour = list(bytes(int(x) for x in rgb.split()))  # (ValueError above 255)
                if name in names or (ignored is not None and colour in [[], *palette, *ignored]):
                    raise ValueError("needs a name and, with `colours`, a colour of its own")

                match line.lower().split():
                    case ["ignore", "0" | "255" as value] if not names and ignored is None:
                        zero_ignored = value == "0"
                    case ["colours" | "colors"] if not names and not zero_ignored:
                        ignored = []
                    case ["ignore", _, _, _] if ignored is not None:
                        ignored.append(colour)
                    case ["ignore" | "colours" | "colors", *_]:
                        raise ValueError(
                            "`ignore 0`, `ignore 255` or `colours` must be the first line, "
                            "`ignore R G B` asks for `colours`"
                        )
                    case _:
                        palette.append(colour or default_colour(len(names)))
                        names.append(name)

        if not 0 < len(names) < 256:
            raise ValueError("must name 1 to 255 classes")
    return Classes(tuple(names), palette, zero_ignored, ignored)


def default_colour(k: int) -> list[int]:
    """A colour for class k. Hues in steps of the golden section are far apart however many there
    are; three brightnesses tell apart what comes near."""
    rgb = colorsys.hsv_to_rgb(k * 0.618 % 1, 0.9, 1 - k % 3 / 4)
    return [round(255 * x) for x in rgb]


# ---- finding the files, and checking them --------------------------------------------------------


def find_pairs(root: str, split: str, optional: bool = False, complete: bool = True) -> list[Pair]:
    """The (image, label) paths of ROOT/images/SPLIT and ROOT/annotations/SPLIT, sorted by name.

    DataError if there are no pictures, or if a file has no partner. optional: [] where neither
    folder exists. complete=False, for check(): a missing partner gets a path where no file is."""
    folders = [join(root, kind, split) for kind in ("images", "annotations")]
    if optional and not any(map(isdir, folders)):
        return []

    images, labels = map(files_by_stem, folders)
    lone = sorted(images.keys() ^ labels.keys())
    if lone and complete:
        raise DataError(f"{root}: no picture or no label file in {split} for {listed(lone)}")
    if not images:
        raise DataError(f"{folders[0]}: holds no pictures")
    return [
        (images.get(stem, join(folders[0], stem)), labels.get(stem, join(folders[1], stem)))
        for stem in sorted(images | labels)
    ]


def files_by_stem(folder: str) -> dict[str, str]:
    """-> {name without suffix: path}, sorted by name, of the files in any format of Pillow"""
    if not isdir(folder):
        raise DataError(
            f"{folder}: no such folder; a data set holds its pictures in images/training and "
            "images/validation, and label files of the same names in annotations/training and "
            "annotations/validation; `python ade20k.py download data/ade` fetches ADE20K (1 GB), "
            "--data DIR names another data set, --data toy draws a small one"
        )

    files = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = splitext(name)
        if suffix.lower() in Image.registered_extensions():
            if stem in files:
                raise DataError(f"{files[stem]}: has the name of {name}, rename one of them")
            files[stem] = join(folder, name)
    return files


def label_warnings(pairs: list[Pair], classes: Classes) -> list[str]:
    """A sentence about the classes that no label holds, if there are any, by at most 300 label
    files spread evenly."""
    some = pairs[:: len(pairs) // 301 + 1]  # (of 300 or fewer, all)
    seen = set()
    for _, path in some:
        seen.update(np.unique(load_label(path, classes)))
    missing = [name for k, name in enumerate(classes.names) if k not in seen]

    # A part of a large set may lack rare classes, but hardly a third of all.
    if not missing or (len(some) < len(pairs) and len(missing) < len(classes.names) / 3):
        return []
    return [
        f"{len(missing)} classes are in none of the {len(some)} label files that were looked at: "
        f"{listed(missing)}"
    ]


def listed(texts: list[str], separator: str = ", ") -> str:
    """All of them, or the first twenty and how many more there are."""
    shown = texts[:20]
    if len(texts) > 20:
        shown.append(f"and {len(texts) - 20} more")
    return separator.join(shown)


def check(root: str) -> int:
    """Read every file of a data set; print every fault by file, the sizes, and the classes. -> the
    number of faults"""
    classes = read_classes(root)
    faults = 0
    for split in ("training", "validation"):
        pairs = find_pairs(root, split, split == "validation", complete=False)
        sizes, counts = [], []
        for n, pair in enumerate(pairs, start=1):
            progress(f"{split}: {n} of {len(pairs)} pictures")
            try:
                _, label = load(*pair, classes)
                sizes.append(label.shape)
                counts.append(np.bincount(label.ravel(), minlength=256))
            except DataError as fault:
                print(f"FAULT {one_line(str(fault))}")
                faults += 1

        print(f"{split}: {len(sizes)} of {len(pairs)} pictures can be used")
        if not sizes:
            continue
        counts = np.array(counts)  # (n, 256)
        pictures = (counts > 0).sum(axis=0)
        share = counts.sum(axis=0) / counts.sum()
        print(
            f"  height and width {np.min(sizes, axis=0)} to {np.max(sizes, axis=0)}, "
            f"{share[IGNORE_INDEX]:.1%} of the pixels unlabelled"
        )
        for k, name in enumerate(classes.names):
            name = one_line(name)
            print(f"  {name:20s} {share[k]:7.2%} of the pixels, {pictures[k]:6d} pictures")
    return faults


# ---- the toy data set ----------------------------------------------------------------------------


def data_root(name: str) -> str:
    """The folder that --data means: `toy` is drawn where it is missing, everything else is a
    path."""
    return make_toy("data/toy") if name == "toy" else name


def make_toy(root: str) -> str:
    """Draw the toy data set, 96 training and 24 validation pictures in ADE20K's layout, in root; if
    it is there, leave it. -> root"""
    return from_tests("toy").make_toy(root)


@cache
def from_tests(name: str) -> ModuleType:
    """The module tests/NAME.py, which draws what this chapter can do without. By its path, from
    whatever folder this runs in: no package needs to be installed."""
    path = join(dirname(os.path.abspath(__file__)), "tests", f"{name}.py")
    if not exists(path):
        raise DataError(f"{path}: is missing, copy the folder tests too")

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- downloading ---------------------------------------------------------------------------------

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"  # as it stands in public scripts; 922 MB


def download(folder: str) -> str:
    """Fetch and unpack ADE20K (2016 challenge) to folder/ADEChallengeData2016; does nothing where
    that exists. -> its path

    A zip that was fetched by other means is taken from folder/ADEChallengeData2016.zip."""
    root = join(folder, "ADEChallengeData2016")
    path = f"{root}.zip"
    if isdir(root):
        return root

    os.makedirs(folder, exist_ok=True)
    with about(f"{path}, from {URL}"):
        if not exists(path):
            socket.setdefaulttimeout(60)  # seconds without a byte; torch itself would wait for ever
            torch.hub.download_url_to_file(URL, path, progress=sys.stderr.isatty())
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha1").hexdigest() != SHA1:
                raise ValueError(f"its SHA-1 is not {SHA1}: remove it, and fetch it again")

        unpacked = f"{root}.part"
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked)
    os.rename(join(unpacked, "ADEChallengeData2016"), root)
    os.rmdir(unpacked)
    return root


# ---- what the four programs share ----------------------------------------------------------------


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


def one_line(text: str) -> str:
    """A text from elsewhere, as a terminal may print it: names in files may hold line breaks, and
    codes that clear the screen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def progress(text: str) -> None:
    """On a terminal, one line that whatever comes next is written over; "" clears it. Elsewhere
    nothing."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="\r", file=sys.stderr, flush=True)


# ---- python ade20k.py ----------------------------------------------------------------------------


def main() -> None:
    actions = {"download": download, "toy": make_toy, "check": check}
    parser = argparse.ArgumentParser(
        description="Get, make or check a data set in ADE20K's layout.",
        epilog="example: python ade20k.py check data/ade/ADEChallengeData2016",
    )
    parser.add_argument(
        "action",
        choices=actions,
        help="download: ADE20K, 1 GB, to DIR/ADEChallengeData2016; toy: draw a small data set in "
        "DIR; check: read all of DIR, report classes, sizes, every fault",
    )
    parser.add_argument("dir", metavar="DIR")
    args = parser.parse_args()

    with errors_in_one_sentence():
        result = actions[args.action](args.dir)
        if args.action == "check":
            sys.exit(result > 0)
        print(result)


if __name__ == "__main__":
    main()
