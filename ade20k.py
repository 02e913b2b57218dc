"""The data: classes, the samples of a run, the transforms; reading, checking, drawing, downloading.

    jpg, png --load--> image (H, W, 3) uint8 RGB, label (H, W) uint8: 0 -> 255 (ignored), k -> k - 1
      --train_transform(rng)--> image (3, S, S) uint8, label (S, S) uint8, its (h, w) before padding
      --train.py's loader--> batches --normalise--> the model

Names of dimensions: H W a picture in pixels, h w the same after scaling, S the side of the crop,
C classes.

Data set: ADE20K scene parsing (Zhou et al. 2017, CVPR; Zhou et al. 2019, IJCV), in the layout of
the challenge of 2016:

    ROOT/images/{training,validation}/NAME.jpg
    ROOT/annotations/{training,validation}/NAME.png
    ROOT/classes.txt                                   only in data sets with other classes

As a program:  python ade20k.py {download,toy,check} DIR
"""

import argparse
import hashlib
import os
import re
import shutil
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from multiprocessing.pool import ThreadPool
from os.path import exists, isdir, join, lexists, splitext
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator, default_rng
from PIL import Image, ImageColor, ImageDraw, ImageOps, PngImagePlugin
from scipy.ndimage import gaussian_filter
from torch import Tensor

from upernet import IGNORE_INDEX

DEFAULT_ROOT = "data/ade/ADEChallengeData2016"


# ---- Classes -------------------------------------------------------------------------------------

# Names and colours of the challenge (objectInfo150, color150). The names are spelled as in the
# reference.
CLASSES = tuple(re.split(r",\s+", """\
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
radiator, glass, clock, flag"""))
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

    names: tuple = CLASSES
    palette: list = PALETTE.tolist()  # [R, G, B] of each, 0..255

    # True, as in ADE20K's label files: k is class k - 1, and 0 means "not labelled". False: k is
    # class k. 255 means "not labelled" in both (as with mmsegmentation's reduce_zero_label).
    zero_ignored: bool = True

    # None: label files hold numbers, as above. A list: they hold colours. A colour of the palette
    # is that class, a colour of this list means "not labelled".
    ignored_colours: list | None = None


# ---- Samples -------------------------------------------------------------------------------------


@dataclass
class TrainSet(torch.utils.data.Dataset):
    """The training samples of a run, counted from its first iteration to its last. The seed and a
    sample's position in this count decide which picture it is, and how it is cut and distorted. So
    the samples do not depend on the number of workers and processes, and a run that is resumed at
    iteration i continues at once with the samples it would have seen."""

    pairs: list  # of (path of a picture, path of its label file)
    seed: int
    crop: int = 512  # the side S
    short: int = 512  # the short side that pictures are scaled to, times 0.5 to 2
    classes: Classes = Classes()

    def paths(self, position: int) -> tuple:
        """The picture's path and its label file's. Every pass over the data has its own order."""
        epoch, i = divmod(position, len(self.pairs))
        rng = default_rng([self.seed, epoch, 0])  # 0: another stream than __getitem__'s
        return self.pairs[rng.permutation(len(self.pairs))[i]]

    def __getitem__(self, position: int) -> tuple:
        """-> image (3, S, S) uint8, label (S, S) uint8, their (h, w) before padding, (2,) int64"""
        with about("a fault in the data (`python ade20k.py check DIR` names all)"):
            image, label = load(*self.paths(position), self.classes)

        rng = default_rng([self.seed, position, 1])
        sample = train_transform(image, label, rng, self.crop, self.short)
        return tuple(map(torch.as_tensor, sample))


def sample_positions(
    start: int, iters: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator:
    """Iteration i takes the positions i * batch to (i + 1) * batch - 1, each process an equal part.
    From iteration start on, yield the list of those that process `rank` of `world` takes."""
    count = batch // world
    for i in range(start, iters):
        first = i * batch + rank * count
        yield list(range(first, first + count))


# ---- Transforms ----------------------------------------------------------------------------------


def train_transform(image: ndarray, label: ndarray, rng: Generator, crop: int, short: int) -> tuple:
    """The reference's training pipeline up to normalisation: scale, crop, flip, distort, pad.

    image (H, W, 3) uint8, label (H, W) uint8 -> (3, crop, crop) uint8, (crop, crop) uint8, (height,
    width) before padding. Padding goes to the right and below. In the label it is 255. In the image
    it must be 0 *after* normalisation. No uint8 becomes exactly that, so normalise(images, sizes)
    sets it. Random numbers are drawn in the reference's order, so that a test can replay the
    reference's stream."""
    # Scale by U(0.5, 2).
    H, W = label.shape
    ratio = rng.random() * 1.5 + 0.5
    h, w = scaled_size(H, W, short, ratio)
    label = label[nearest_indices(H, h)][:, nearest_indices(W, w)]  # (h, w)

    # A crop in which one class covers 75% or more of the labelled pixels teaches little: it is
    # redrawn, at most ten times.
    for _ in range(11):
        y = rng.integers(max(h - crop, 0) + 1)
        x = rng.integers(max(w - crop, 0) + 1)
        cropped = label[y : y + crop, x : x + crop]
        # How many pixels each class has. (bincount takes twice as long.)
        pixels = Image.fromarray(cropped).histogram()[:IGNORE_INDEX]
        if max(pixels) < 0.75 * sum(pixels):
            break

    # Of the image only the part inside the crop is resized.
    label = cropped
    height, width = label.shape  # crop, or less where the picture is smaller
    image = resize_bilinear(image, h, w, (y, x, y + height, x + width))  # (3, height, width)

    if rng.random() < 0.5:
        image = np.flip(image, axis=2)
        label = np.flip(label, axis=1)
    image = distort(image, rng)

    pad = [(0, crop - height), (0, crop - width)]
    image = np.pad(image, [(0, 0), *pad])  # (3, crop, crop)
    label = np.pad(label, pad, constant_values=IGNORE_INDEX)  # (crop, crop)
    return image, label, (height, width)


def scaled_size(height: int, width: int, short: int, ratio: float) -> tuple:
    """The largest (h, w) with the same aspect ratio whose long side is at most 4 short * ratio and
    whose short side is at most short * ratio, as mmcv.rescale_size has it. No side is less than
    1."""
    scale = min(
        int(4 * short * ratio) / max(height, width), int(short * ratio) / min(height, width)
    )
    return tuple(max(1, int(side * scale + 0.5)) for side in (height, width))


def nearest_indices(old: int, new: int) -> ndarray:
    """The old pixel that each new one is taken from, (new,), as in cv2's INTER_NEAREST: floor(i *
    old / new). That is the new pixel's corner, not its centre."""
    index = np.arange(new) * (1 / (new / old))  # cv2's way to old / new: the last bit may differ
    return np.minimum(np.int64(index), old - 1)


def resize_bilinear(image: ndarray, h: int, w: int, box: tuple = ()) -> ndarray:
    """What cv2.resize(image, (w, h))[y0:y1, x0:x1] gives, within one grey level. Only the box (y0,
    x0, y1, x1) is computed; without one, everything.

    image (H, W, 3) uint8 -> (3, y1 - y0, x1 - x0) uint8. Shrinking does not antialias. Pillow's
    filters do, and would feed the network smoother pictures than the published runs saw."""
    y0, x0, y1, x1 = box or (0, 0, h, w)
    H, W, _ = image.shape
    y = (np.arange(y0, y1) + 0.5) * H / h - 0.5  # where the new centres lie in the old picture
    x = (np.arange(x0, x1) + 0.5) * W / w - 0.5

    # Take the n rows that the result needs, mix their columns, mix the rows.
    first = int(y[0])
    image = image[first : int(y[-1]) + 2].transpose(2, 0, 1)  # (3, n, W)
    image = np.ascontiguousarray(image, np.float32)
    image = interpolate(image, x, axis=2)  # (3, n, x1 - x0)
    image = interpolate(image, y - first, axis=1)  # (3, y1 - y0, x1 - x0)
    image += 0.5  # so that the truncation rounds
    return np.uint8(image)


def interpolate(x: ndarray, place: ndarray, axis: int) -> ndarray:
    """x (3, H, W) float32, read at m places between its pixels along an axis, which becomes m long.
    Place 2.25 is a quarter of the way from pixel 2 to pixel 3."""
    index = np.intp(np.floor(place))
    weight = np.float32(place - index)
    if axis == 1:
        weight = weight[:, None]

    # before + (after - before) * weight, in place, because new memory costs more than the sums.
    # mode="clip" repeats the last pixel beyond the border.
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
        # A table of the 180 hues, turned: a `%` for every pixel would be slow.
        turned = (np.arange(180) + rng.integers(-18, 18)) % 180
        image = hsv_to_rgb(turned.take(hue), saturation, value)

    if not contrast_second and rng.integers(2):
        image = scale_levels(image, rng.uniform(0.5, 1.5))
    return image


def scale_levels(x: ndarray, factor: float, offset: float = 0) -> ndarray:
    """x * factor + offset, clipped to 0..255 and truncated, uint8."""
    return to_uint8(np.float32(x) * factor + offset)


def to_uint8(x: ndarray) -> ndarray:
    # Values outside 0..255 are clipped first: the bare conversion would wrap around.
    return np.uint8(x.clip(0, 255))


# ImageNet's mean and standard deviation of R, G, B. The reference uses them for ViT-B too, although
# ViT-B was pretrained with 127.5 / 127.5.
MEAN_STD = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).view(2, 3, 1, 1)


def normalise(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 -> (x - mean) / std, float32, on the images' device. sizes (B, 2): each
    picture's (h, w) before padding; what lies outside becomes 0."""
    # (A blocking copy would wait until the GPU has finished all earlier work.)
    mean, std = MEAN_STD.to(images.device, non_blocking=True)
    x = (images.float() - mean) / std
    if sizes is None:
        return x

    h, w = sizes.T[..., None, None, None]  # each (B, 1, 1, 1)
    row, column = (torch.arange(n, device=x.device) for n in x.shape[2:])  # (H,), (W,)
    return x * ((row[:, None] < h) & (column < w))


# ---- HSV, as the reference's cv2 rounds it -------------------------------------------------------

# cv2 has HSV in uint8: hue 0..179 (2 degrees a step), saturation and value 0..255. The rounding is
# part of the recipe, since hue and saturation distortion see the picture through it. If you take it
# on trust that both functions equal cv2's, continue with the next part.


# cv2 does not divide by the value (the largest channel) and the spread (the largest minus the
# smallest), but multiplies by tables of 255 / value and 30 / spread, for 1 to 255, in fixed point
# with 12 binary places. 30 steps of hue are a sixth of the circle. (Where value or spread is 0, so
# is the number that it would divide.)
HUE_STEP, SATURATION_STEP = np.int32(
    np.rint(np.array([[30], [255]]) * 4096 / np.arange(256).clip(1))
)


def rgb_to_hsv(image: ndarray) -> tuple:
    """(3, H, W) uint8 -> hue 0..179, saturation 0..255, value 0..255, integers equal to cv2's, each
    (H, W)."""
    rgb = np.int16(image)
    r, g, b = rgb
    value = rgb.max(axis=0)
    spread = value - rgb.min(axis=0)

    # The hue lies around that of the largest channel: red has 0, green 60, blue 120.
    hue = np.where(value == g, b - r + 2 * spread, r - g + 4 * spread)
    hue = np.where(value == r, g - b, hue)

    saturation = spread * SATURATION_STEP.take(value, mode="clip")
    hue = hue * HUE_STEP.take(spread, mode="clip")
    for x in (saturation, hue):
        x += 2048  # half of 4096, so that the shift rounds
        x >>= 12
    hue[hue < 0] += 180
    return np.intp(hue), saturation, value  # (intp, because the hue will index tables)


# Back to RGB (Smith 1978, "Color gamut transform pairs"): channel = value * (1 - saturation *
# fade(hue)). fade is 0 over the two of six sectors where the channel dominates (R around hue 0, G
# around 60, B around 120), 1 over the two opposite, a ramp between. It is rounded to float32 as in
# cv2's vector code, so that the truncation at the end meets the same numbers.
SECTOR = np.float32(np.arange(180)) * (6 / 180)  # (180,): each hue as a number of sectors, 0..6
PLACE = (SECTOR + [[5], [3], [1]]) % 6  # (3, 180) float64: of R, G, B
FADE = np.float64(np.float32(np.minimum(PLACE, 4 - PLACE).clip(0, 1)))


def hsv_to_rgb(hue: ndarray, saturation: ndarray, value: ndarray) -> ndarray:
    """The inverse of rgb_to_hsv, truncated, equal to cv2's vector code. (At the end of a row cv2
    uses other code, which rounds.) -> (3, H, W) uint8"""
    value = np.float32(value) * (1 / 255)
    saturation = np.float64(np.float32(saturation) * (1 / 255))

    channels = []
    for fade in FADE:
        # 1 - saturation * fade is computed in float64 and rounded once, because cv2 uses a fused
        # multiply-add there. In place, because new memory costs more than the sums.
        x = fade.take(hue)
        x *= saturation
        x = np.float32(1 - x)
        x *= value
        x *= 255
        channels.append(np.uint8(x))
    return np.stack(channels)


# ---- Reading -------------------------------------------------------------------------------------

# Pillow refuses a png with more than 1 MB of text. Accept up to 16 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 16_000_000

# Formats of pictures, whatever a file is called. Pillow decodes these by itself. (For others it
# starts programs: Ghostscript for EPS files, which are programs too.) Formats of labels lose
# nothing.
PICTURES = "JPEG PNG TIFF WEBP AVIF BMP GIF PPM JPEG2000".split()
LABELS = ("PNG", "TIFF", "BMP")


class UserError(Exception):
    """An error that the user can mend. Its text is one sentence: the file or option, its value, and
    what to do."""


class DataError(UserError):
    """A fault in the data."""


@contextmanager
def about(subject: str, kind: type = DataError) -> Iterator:
    """Any error inside becomes one of this kind, whose sentence begins with the subject, most often
    the file's name."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise almost anything
        raise kind(f"{subject}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an exception says, without the advice in further lines; its type if it says nothing."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0]


def load(image_path: str, label_path: str | None, classes: Classes = Classes()) -> tuple:
    """The image (H, W, 3) uint8 and the label (H, W) uint8 of one sample, as load_image and
    load_label read them. Without a label file the label is None. DataError if the sizes differ."""
    image = load_image(image_path)
    if label_path is None:
        return image, None

    label = load_label(label_path, classes)
    size = image.shape[:2]
    if label.shape != size:
        raise DataError(
            f"{image_path}: the picture, turned as its EXIF block says, has height and width "
            f"{size}, its label file {label.shape}, both must be equal (a third number: save one "
            "channel)"
        )
    return image, label


def load_image(path: str) -> ndarray:
    """A picture in one of the formats PICTURES -> (H, W, 3) uint8 RGB, upright. DataError if it
    cannot be read.

    As in cv2.imread, grey is repeated, alpha is dropped, 16 bits are cut to the upper 8, and EXIF
    rotation is applied."""
    with about(f"{path}: cannot be read as a picture"):
        try:
            picture = Image.open(path, formats=PICTURES)
        except Image.DecompressionBombError as error:
            raise ValueError("has more than 178 million pixels, cut it into tiles") from error

        # A truncated file raises its error here. An error of a broken EXIF block is ignored: by
        # then, exif_transpose has turned the pixels.
        picture.load()
        with suppress(Exception):
            ImageOps.exif_transpose(picture, in_place=True)

        # 16 bits: Pillow would clip them, not scale them. Floating-point numbers, whose range is
        # unknown, cannot be shifted, so a file of them raises an error here.
        if picture.mode[0] in "IF":
            picture = Image.fromarray(to_uint8(np.asarray(picture) >> 8))
        return np.asarray(picture.convert("RGB"))


def load_label(path: str, classes: Classes = Classes()) -> ndarray:
    """A label file -> (H, W) uint8, 0..C-1, or 255 where there is no label.

    The file has one channel of 1, 8 or 16 bits (with a palette, its indices), or the classes'
    colours. DataError if its format may have changed labels, or if it holds a value or a colour
    that is neither a class nor ignored."""
    with about(path), Image.open(path, formats=PICTURES) as file:
        # Refuse what may have changed labels: lossy formats (a TIFF may hold a JPEG), and grey of 2
        # or 4 bits, which Pillow stretches to 0..255.
        stored = str([file.tile, file.info.get("compression")])
        if file.format not in LABELS or re.search("jpeg|webp|L;[24]", stored):
            raise ValueError(f"is a {file.format} file that may change labels, save as 8-bit png")

        # values -> label: 0..C-1, 255, or -1 where a value has no meaning.
        count = len(classes.names)
        if classes.ignored_colours is None:
            values = np.asarray(file)  # (H, W)

            # Labels are shifted here, and back only where evaluate.py saves predictions.
            first = int(classes.zero_ignored)
            table = np.full(65536, -1, np.int16)  # what each value of a file means
            table[[0, IGNORE_INDEX]] = IGNORE_INDEX
            table[first : first + count] = range(count)
            label = table.take(values)  # (H, W)
        elif ";16" in stored:
            raise ValueError("has 16 bits a colour, those in classes.txt have 8: save it with 8")
        else:
            values = np.asarray(file.convert("RGB"))  # (H, W, 3)
            colours = values @ [65536, 256, 1]  # (H, W), each colour as one number
            label = np.full(colours.shape, -1)
            for k, colour in enumerate(classes.palette + classes.ignored_colours):
                label[colours == int.from_bytes(colour)] = k
            label[label >= count] = IGNORE_INDEX

        wrong = values[label < 0]
        if wrong.size:
            raise ValueError(
                f"holds {wrong[0]}, which is neither a class nor ignored; classes.txt says what "
                "labels mean, and begins with a line `colours` where they are colours"
            )
        return np.uint8(label)


def read_classes(root: str) -> Classes:
    """The classes of ROOT/classes.txt, or ADE20K's where there is no such file.

    Each line is a name, or a name and its colour, `R G B` or `#RRGGBB`; another # begins a comment.
    The first line may be `ignore 0` or `ignore 255` or both (see zero_ignored), or `colours` (see
    ignored_colours). After `colours` each name needs its own colour, and lines `ignore R G B` name
    colours of unlabelled pixels. DataError with the line that cannot be used."""
    path = join(root, "classes.txt")
    if not lexists(path):
        return Classes()

    names, palette, zero_ignored, ignored = [], [], False, None
    with about(path), open(path, encoding="utf-8-sig") as file:
        for line in file:
            # A comment is what begins with #, except a colour at the end.
            line = re.sub(r"(^|\s)#(?![\da-fA-F]{6}\s*$).*", "", line).strip()
            if not line:
                continue

            with about(repr(line)):
                name, rgb, hexa = re.fullmatch(
                    r"(.*?)(?:((?:\s+\d+){3})|\s+#(\w{6}))?", line
                ).groups("")
                colour = [*bytes(map(int, rgb.split())), *bytes.fromhex(hexa)]  # [] without
                if name in names or (ignored is not None and colour in [[], *palette, *ignored]):
                    raise ValueError("needs a name and, with `colours`, a colour of its own")

                match line.lower().split():
                    case ["ignore", "0" | "255" as value] if not names:
                        zero_ignored |= value == "0"
                    case ["colours" | "colors"] if not names and not zero_ignored:
                        ignored = []
                    case ["ignore", *_] if colour and ignored is not None:
                        ignored.append(colour)
                    case ["ignore" | "colours" | "colors" | "name,r,g,b", *_]:
                        raise ValueError(
                            "`ignore 0`, `ignore 255` and `colours` must be the first lines, "
                            "`ignore R G B` needs `colours`; a class is `name` or `name R G B`"
                        )
                    case _:
                        # Without a colour, hues in steps of the golden section: far apart,
                        # however many there are. Three brightnesses tell apart hues that come near.
                        k = len(names)
                        hsv = f"hsv({k * 222.48 % 360}, 90%, {100 - k % 3 * 25}%)"
                        palette.append(colour or list(ImageColor.getrgb(hsv)))
                        names.append(name)

        if not 0 < len(names) < 256 - zero_ignored:  # 255 is never a class
            raise ValueError("must name 1 to 255 classes, with `ignore 0` 1 to 254")
    return Classes(tuple(names), palette, zero_ignored, ignored)


# ---- Finding the files, and checking them --------------------------------------------------------


def find_pairs(root: str, split: str, optional: bool = False) -> list:
    """The (image, label) paths of ROOT/images/SPLIT and ROOT/annotations/SPLIT, and of the folders
    below them, sorted by name. (A name includes the folders below SPLIT. What is hidden does not
    count.)

    DataError if there are no pictures, or if one of them has not exactly one label file of its
    name, or the reverse. optional: [] if there are neither pictures nor label files."""
    folders = [join(root, kind, split) for kind in ("images", "annotations")]
    found = defaultdict(list)  # name without suffix -> (folder, name) of its files, pictures first
    for folder in folders:
        for name in glob("**", root_dir=folder, recursive=True):
            stem, suffix = splitext(name)
            if Image.registered_extensions().get(suffix.lower()) in PICTURES:
                found[stem].append((folder, name))

    if not found:
        if optional:
            return []
        raise DataError(
            f"{folders[0]}: no such folder, or no pictures in it (save HEIC as JPEG); a data set "
            "holds its pictures in images/training and images/validation, and label files of the "
            "same names in annotations/training and annotations/validation; `python ade20k.py "
            "download data/ade` fetches ADE20K (1 GB), --data DIR names another data set, --data "
            "toy draws a small one"
        )

    # Right is one file of a name in each folder.
    names = sorted(found)
    wrong = [name for name in names if [folder for folder, _ in found[name]] != folders]
    if wrong:
        raise DataError(
            f"{root}: each picture in images/{split} needs one label file of its name in "
            f"annotations/{split}, each label file one picture, not so: {listed(wrong)}"
        )
    return [tuple(join(*file) for file in found[name]) for name in names]


def data_warnings(split: str, pairs: list, classes: Classes) -> Iterator:
    """Yield a sentence about the classes that no label holds, if all labels were read or many
    classes are missing, and one about odd pictures. At most 300 pairs are read, evenly spread."""
    some = pairs[:: (len(pairs) - 1) // 300 + 1]  # all, if there are 300 or fewer
    _, counts, odd = zip(*[look_at(pair, classes) for pair in some])
    missing = [name for name, count in zip(classes.names, sum(counts)) if not count]

    # Some files of a large set may lack rare classes, but hardly a third of all classes.
    if missing and (some == pairs or len(missing) >= len(classes.names) / 3):
        yield (
            f"{split}: none of the {len(some)} label files that were looked at holds a pixel of "
            f"{listed(missing)}"
        )
    odd = listed([*filter(None, odd)])
    if odd:
        yield odd


def look_at(pair: tuple, classes: Classes) -> tuple:
    """Read a picture and its label. -> height and width; how many pixels have each value (256,);
    what is odd about the picture, "" if nothing is"""
    path, _ = pair
    image, label = load(*pair, classes)
    odd = ""
    with Image.open(path, formats=PICTURES) as file:
        if file.format == "TIFF" and file.n_frames > 1:  # (phones' JPEGs hold several by habit)
            odd = f"{path} holds several pages: only the first one is read"
    if image.max() < 16:
        odd = f"{path} is very dark: of 16 bits the upper 8 are read; multiply 12 by 16, 8 by 256"
    return label.shape, np.bincount(label.ravel(), minlength=256), odd


def listed(texts: list) -> str:
    """The texts in one line: all of them, or the first twenty and how many more there are."""
    shown = texts[:20]
    if len(texts) > 20:
        shown.append(f"and {len(texts) - 20} more")
    return ", ".join(shown)


def check(root: str) -> list:
    """Read every file of a data set. Print the sizes, how often each class occurs, what is odd, and
    in the end every fault with its file. -> the faults"""
    classes = read_classes(root)
    faults = []

    def read(pair):
        """-> [what look_at says] or, after a fault, []"""
        try:
            return [look_at(pair, classes)]
        except DataError as fault:
            faults.append(str(fault))
            return []

    for split, pairs in (
        ("training", find_pairs(root, "training")),
        ("validation", find_pairs(root, "validation", optional=True)),
    ):
        good = []
        with ThreadPool(16) as pool:  # Pillow decodes outside Python's lock
            for facts in pool.imap(read, pairs):
                good += facts
                progress(f"{split}: {len(good)} of {len(pairs)}")

        say(f"{split}: {len(good)} of {len(pairs)} pictures can be used")
        if good:
            sizes, counts, odd = map(np.array, zip(*good))  # (n, 2), (n, 256), (n,)
            say(f"  height and width {sizes.min(axis=0)} to {sizes.max(axis=0)}")
            shares = counts.sum(axis=0) / counts.sum()  # (256,)
            pictures = np.count_nonzero(counts, axis=0)  # (256,)
            for k, name in [*enumerate(classes.names), (IGNORE_INDEX, "(not labelled)")]:
                say(f"  {name:20s} {shares[k]:7.2%} of the pixels, {pictures[k]:6d} pictures")
            say(*filter(None, odd))

    for fault in sorted(faults):
        say(f"FAULT {fault}")
    return faults


# ---- The toy data set ----------------------------------------------------------------------------

# Outdoor scenes drawn by code, to try everything before the real download. A scene is a small world
# in metres: x to the right, y up, z ahead, the ground at y = 0, the eye at (0, EYE, 0), looking
# along z. By similar triangles the point (x, y, z) appears at
#
#     column = WIDTH / 2 + FOCAL * x / z          row = HORIZON + FOCAL * (EYE - y) / z
#
# on a canvas twice as high and wide as the picture. In the end it is shrunk, to make edges smooth.
HEIGHT, WIDTH, FOCAL, HORIZON, EYE = 384, 512, 440, 160, 4

# classes.txt, with ADE20K's names and colours. A label file holds the number of a class's line,
# from 0: 0 is not labelled, 1 is building.
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
TOY_VALUES = re.findall(r"(?m)^\w+", TOY_CLASSES)  # names: the value of a class is its index here

# The things, one shape per line, from back to front. First the thing, then the colour of the shape
# (?: one of BRIGHT, by chance; shadow: it darkens what is there), then the corners of a polygon:
# x,y or x,y,z in metres from the place where the thing stands. Two corners, upper left and lower
# right, make an ellipse.
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

# The scenes. First the strips of the ground from left to right: class, colour, and the x where the
# strip begins. Then what stands on it: thing, class, how many at most, and two z,x, the corners of
# the area where they stand. The scene decides the class of a thing: the same house is a building
# where it stands in a street.
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

# The lights, one per line: the factors of all colours, the colour of the sky above, the colour of
# everything far away, the metres of air after which 1 / e of a colour is left, and how dark shadows
# are.
LIGHTS = """
1.06,1.03,0.97 62,124,211 186,216,236 500 0.5
1.14,0.93,0.70 90,130,240 255,208,150 400 0.5
0.86,0.90,0.94 160,170,178 206,212,216 300 0.2
0.90,0.92,0.92 195,206,215 212,218,220 220 0.1
"""


def draw_scene(rng: Generator) -> tuple:
    """One scene: a picture (192, 256, 3) uint8 RGB and its label (192, 256) uint8, in the values
    that label files hold."""
    ground, crowds = rng.choice(SCENES).split("\n\n")
    sun, zenith, haze, air, shadow = map(numbers, rng.choice(rows(LIGHTS)))
    bend = rng.uniform(-0.006, 0.006)  # x = 0 of the tables lies at bend * min(z, 60)^2

    def in_haze(colour, z):  # what is left of a colour behind z metres of air
        return haze + (colour - haze) * np.exp(-z / air)

    image, label, distance = draw_ground(rows(ground), zenith, bend, rng)
    canvas = Image.fromarray(to_uint8(in_haze(sun * image, distance)))
    labels = Image.fromarray(label)
    shade = Image.new("L", canvas.size)

    # The things: each of `count` is there with a chance of 0.8. They are drawn from far to near,
    # into the picture and the label alike, and hide the shadows behind them.
    places = [  # z, x, thing, class
        (*rng.uniform(*map(numbers, between)), thing, name)
        for thing, name, count, *between in rows(crowds)
        for _ in range(rng.binomial(int(count), 0.8))
    ]
    for z, x, thing, name in sorted(places, reverse=True):
        place = x + bend * min(z, 60) ** 2, 0, z  # x, y, z
        size, tint = rng.uniform(0.85, 1.15, (2, 3))  # of x, y, z; of R, G, B

        for owner, colour, *corners in rows(THINGS):
            if owner == thing:
                # (n, 3): the 0 is the z of corners that have only two numbers.
                corners = place + size * [numbers(corner + ",0")[:3] for corner in corners]
                draw(shade, corners, 255 if colour == "shadow" else 0)
                if colour != "shadow":
                    colour = sun * tint * numbers(rng.choice(BRIGHT) if colour == "?" else colour)
                    draw(canvas, corners, tuple(np.int_(in_haze(colour, z))))
                    draw(labels, corners, TOY_VALUES.index(name))

    # 2 x 2 pixels become one: their mean in the picture, the first of them in the label. Shadows
    # have soft edges, and a camera adds noise.
    dark = shadow / 255 * gaussian_filter(np.asarray(shade.reduce(2)), 2)[:, :, None]
    image = np.asarray(canvas.reduce(2)) * (1 - dark) + 4 * rng.standard_normal((192, 256, 3))
    return to_uint8(image), np.asarray(labels)[::2, ::2]


def draw_ground(strips: list, zenith: ndarray, bend: float, rng: Generator) -> tuple:
    """Sky and ground: the picture (HEIGHT, WIDTH, 3), 0 to 255, the label (HEIGHT, WIDTH), and how
    many metres away each pixel is (HEIGHT, WIDTH, 1)."""
    names, colours, edges = zip(*strips)  # the edges: each x where a strip begins
    values = np.uint8([*map(TOY_VALUES.index, ("sky", *names))])
    colours = np.array([zenith, *map(numbers, colours)])

    # The projection inverted for y = 0: the place on the ground that each pixel shows. The sky is
    # the same plane upside down, except that its haze is that of a plane six times as far away.
    row, column, _ = np.indices((HEIGHT, WIDTH, 1)) + 0.5  # each (HEIGHT, WIDTH, 1)
    sky = row < HORIZON
    z = FOCAL * EYE / abs(row - HORIZON)
    x = (column - WIDTH / 2) * z / FOCAL - bend * np.minimum(z, 60) ** 2
    # Which strip each pixel shows, (HEIGHT, WIDTH): 1 for the first, 0 for the sky.
    part = (np.searchsorted(np.float64(edges), x) * ~sky)[:, :, 0]

    # Noise that is smoothed a little makes rough ground. Smoothed much, it makes clouds. Its cells
    # are a tenth of a metre wide, and it repeats itself.
    noise = rng.standard_normal((256, 256))
    at = tuple(np.int_([10 * z, 10 * x]) % 256)
    grain = gaussian_filter(noise, 1, mode="wrap")[at]
    cloud = gaussian_filter(noise, 8, mode="wrap")[at] * 14 + rng.uniform(-0.6, 0.4)
    image = colours[part] * (1 + 0.2 * grain)
    image += sky * cloud.clip(0, 0.9) * (245 - image)  # from the sky's colour towards white
    return image, values[part], z * (1 + 5 * sky)


def draw(canvas: Image.Image, corners: ndarray, fill) -> None:
    """Fill the polygon with these corners (n, 3), or the ellipse between two corners (2, 3)."""
    x, y, z = corners.T
    points = list(zip(WIDTH / 2 + FOCAL * x / z, HORIZON + FOCAL * (EYE - y) / z))

    pen = ImageDraw.Draw(canvas)
    shape = pen.ellipse if len(corners) == 2 else pen.polygon
    shape(points, fill)


def rows(table: str) -> list:
    """The words of each line."""
    return [line.split() for line in table.strip().splitlines()]


def numbers(text: str) -> ndarray:
    """ "1,2.5" -> array([1, 2.5]) """
    return np.float64(text.split(","))


def data_root(name: str) -> str:
    """The folder that --data means: `toy` is data/toy, which is drawn if it is missing; everything
    else is a path."""
    return make_toy("data/toy") if name == "toy" else name


def make_toy(root: str) -> str:
    """Draw 96 training and 24 validation pictures in ADE20K's layout in the folder root, with their
    classes.txt. If root exists, leave it as it is. -> root"""
    if exists(root):
        return root

    part = f"{Path(root)}.part{os.getpid()}"  # renamed to root when it is complete
    for i in range(120):
        split = "training" if i < 96 else "validation"
        image, label = draw_scene(default_rng([1831, i]))  # 1831: all scenes about equally often
        for kind, pixels, end in (("images", image, "jpg"), ("annotations", label, "png")):
            path = Path(part, kind, split, f"toy_{i % 96:03d}.{end}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)

    Path(part, "classes.txt").write_text(TOY_CLASSES)
    try:
        os.rename(part, root)
    except OSError:  # another process was faster, with the same pictures
        shutil.rmtree(part)
        if not exists(root):
            raise
    return root


# ---- Downloading ---------------------------------------------------------------------------------

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"  # of the 922 MB, as public scripts have it


def download(folder: str) -> str:
    """Fetch ADE20K (2016 challenge) and unpack it to folder/ADEChallengeData2016. If that exists,
    do nothing. -> its path

    If folder/ADEChallengeData2016.zip exists, it is unpacked, not fetched again."""
    root = join(folder, "ADEChallengeData2016")
    path = f"{root}.zip"
    if isdir(root):
        return root

    os.makedirs(folder, exist_ok=True)
    with about(f"{path}, from {URL}"):
        if not exists(path):
            fetch_url(URL, path)
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha1").hexdigest() != SHA1:
                raise ValueError(f"its SHA-1 is not {SHA1}: remove it, and fetch it again")

        part = f"{root}.part"
        shutil.unpack_archive(path, part)
    os.renames(join(part, "ADEChallengeData2016"), root)  # and remove part, empty now
    return root


def fetch_url(url: str, path: str, sha256: str | None = None) -> None:
    """Fetch what lies behind a URL. sha256: its first digits, to compare. torch itself would wait
    for ever for a server that stalls."""
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        torch.hub.download_url_to_file(url, path, sha256, sys.stderr.isatty())
    finally:
        socket.setdefaulttimeout(None)  # Python's own default


# ---- What the four programs share ----------------------------------------------------------------


@contextmanager
def errors_in_one_sentence() -> Iterator:
    """Errors that the user can mend end the program with one sentence and exit code 2, without a
    traceback. All four programs run inside it."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # \u4e2d for a letter that a terminal lacks
    try:
        yield
    except (UserError, OSError) as error:
        warn(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def say(*lines: str) -> None:
    """Print lines. All four programs print by say(), warn() and progress() only."""
    for line in lines:
        put(one_line(line) + "\n", sys.stdout)


def warn(line: str) -> None:
    put(one_line(line) + "\n", sys.stderr)


def progress(text: str) -> None:
    """On a terminal, print a line that the next output overwrites; "" clears it. Otherwise print
    nothing."""
    if sys.stderr.isatty():
        put(f"\r{text}\033[K\r", sys.stderr)


def one_line(text: str) -> str:
    """The text, safe for a terminal. Names of files and classes may hold line breaks, or codes that
    clear the screen. A damaged file's may be very long."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:5000]


def put(text: str, file: TextIO) -> None:
    """Print text. Where that is not possible (a closed terminal, a full disk, `| head -1`), the
    program continues in silence: its work and its exit code do not depend on its words."""
    try:
        file.write(text)
        file.flush()
    except OSError:  # (Python would try again at the end, and leave with code 120)
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


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
    parser.add_argument("DIR")
    args = parser.parse_args()

    with errors_in_one_sentence():
        result = actions[args.action](args.DIR)
        if args.action == "check":
            sys.exit(result != [])
        say(result)


if __name__ == "__main__":
    main()
