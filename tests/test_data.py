"""ade20k.py against the real reference's transforms (goldens), plain loops, and damaged files."""

import contextlib
import csv
import hashlib
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from zlib import crc32

import formulas
import numpy as np
import pytest
import torch
from conftest import ROOT, ReplayedRng, largest_error
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.io import loadmat

import ade20k
from ade20k import Classes, DataError


def save(path, values, kind=None, **options):
    """Write an array as a picture file, in the format of its name or of `kind`."""
    pixels = np.asarray(values, np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(path, kind, **options)


def save_label(path, value):
    """Write a label file with one value all over, of the size of small_set's pictures."""
    save(path, np.full((40, 60), value))


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def name_of(path):
    name, _ = os.path.splitext(os.path.basename(path))
    return name


def plain_classes(names, zero_ignored=False):
    """Classes with these names (or letters), in greys."""
    greys = [[k, k, k] for k in range(len(names))]
    return Classes(tuple(names), greys, zero_ignored)


def refused(message, function, *args):
    with pytest.raises(DataError, match=message):
        function(*args)


@pytest.fixture
def small_set(tmp_path):
    """Two good pictures in ADE20K's layout. -> its root"""
    root = tmp_path / "set"
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            os.makedirs(root / kind / split)

    for i in range(2):
        picture = formulas.picture(40, 60, seed=i)
        save(root / f"images/training/p{i}.jpg", picture)
        save_label(root / f"annotations/training/p{i}.png", 1 + i)
    return str(root)


# ---- transforms ----


def test_training_geometry_replays_the_references_random_stream(sample, golden, monkeypatch):
    gold = golden("transforms")
    monkeypatch.setattr(ade20k, "distort", lambda image, rng: image)
    pairs = ade20k.find_pairs(sample, "training")
    for i, (image_path, label_path) in enumerate(pairs):
        image, label = ade20k.load(image_path, label_path)
        name = name_of(image_path)

        for seed in (0, 1, 2):
            key = f"{name}_{seed}"
            rng = ReplayedRng(1000 * i + seed)
            x, y, (h, w) = ade20k.train_transform(image, label, rng, 512, 512)
            assert x.shape == (3, 512, 512)
            assert y.shape == (512, 512)
            assert x.dtype == y.dtype == np.uint8

            exact = crc32(np.ascontiguousarray(y).tobytes())
            assert exact == gold[key + "_label"], "labels are exact to the last pixel"
            pixels = x.reshape(3, -1).T
            some = pixels[::397]
            assert largest_error(some, gold[key + "_image"]) <= 1, key
            assert rng.random() == gold[key + "_next"], "as many random numbers were drawn"

            below = y[h:]
            right = y[:, w:]
            assert (below == 255).all()
            assert (right == 255).all()


def test_distortion_replays_the_reference_within_one_level(golden):
    gold = golden("transforms")
    for seed in range(24):
        image = formulas.picture(seed=seed)
        channels = image.transpose(2, 0, 1)
        got = ade20k.distort(channels, ReplayedRng(seed))

        some = got[:, ::5, ::5].transpose(1, 2, 0)
        want = gold[f"distort_{seed}"]
        assert largest_error(some, want) <= 1, seed


def test_test_resize_equals_cv2_within_one_level_on_real_pictures(sample, golden):
    gold = golden("transforms")
    pairs = ade20k.find_pairs(sample, "training")
    pairs = pairs + ade20k.find_pairs(sample, "validation")
    for image_path, _ in pairs:
        image = ade20k.load_image(image_path)
        name = name_of(image_path)
        H, W = image.shape[:2]

        for ratio in (0.5, 1.0, 1.75):
            key = f"test_{name}_{ratio}"
            h, w = ade20k.scaled_size(H, W, 512, ratio)
            assert (h, w) == tuple(gold[key + "_size"])

            got = ade20k.resize_bilinear(image, h, w)
            pixels = got.reshape(3, -1).T
            some = pixels[::797]
            assert largest_error(some, gold[key]) <= 1, key


def test_resize_of_a_box_is_the_box_of_the_resize():
    image = formulas.picture(61, 83)
    for h, w in ((61, 83), (40, 50), (122, 170), (20, 300)):
        whole = ade20k.resize_bilinear(image, h, w)
        all_of_it = (0, 0, h, w)
        inside = (3, 5, 17, 40)
        corner = (h - 7, w - 9, h, w)

        for box in (all_of_it, inside, corner):
            y0, x0, y1, x1 = box
            part = ade20k.resize_bilinear(image, h, w, box)
            want = whole[:, y0:y1, x0:x1]
            assert (part == want).all()


def between(position, size, new_size):
    """Where a place on an axis of new_size pixels lies on one of size pixels: between the first and
    the second of what is returned, so far on the way as the third says."""
    centre = position + 0.5
    source = centre * size / new_size - 0.5
    source = np.clip(source, 0, size - 1)
    first = int(source)
    second = min(first + 1, size - 1)
    return first, second, source - first


def mixed(first, second, share):
    return (1 - share) * first + share * second


def test_resize_is_plain_bilinear_interpolation():
    image = formulas.picture(7, 9)
    got = ade20k.resize_bilinear(image, 11, 5)

    for y in range(11):
        top, bottom, down = between(y, 7, 11)
        for x in range(5):
            left, right, across = between(x, 9, 5)
            above = mixed(image[top, left], image[top, right], across)
            below = mixed(image[bottom, left], image[bottom, right], across)
            want = mixed(above, below, down)
            error = largest_error(got[:, y, x], want)
            assert error <= 0.5 + 1e-3


def replayed_crop(label, rng, side):
    """The rule of the crop, plainly: draw until two classes or more share it below 75%, at most
    ten times anew. -> the crop, and whether it was drawn anew"""
    h, w = label.shape
    lowest = max(h - side, 0)
    rightmost = max(w - side, 0)
    for attempt in range(11):
        y = rng.integers(0, lowest + 1)
        x = rng.integers(0, rightmost + 1)
        crop = label[y : y + side, x : x + side]

        labelled = crop[crop != 255]
        _, counts = np.unique(labelled, return_counts=True)
        shares = counts / counts.sum()
        if len(counts) > 1 and shares.max() < 0.75:
            break
    return crop, attempt > 0


def test_crop_is_redrawn_while_one_class_fills_it():
    image = np.zeros((100, 300, 3), np.uint8)
    label = np.zeros((100, 300), np.uint8)
    label[:60, :60] = 1
    label[70:, 200:] = 255
    redrawn = 0

    for seed in range(40):
        rng = ReplayedRng(seed)
        ratio = rng.random() * 1.5 + 0.5
        h, w = ade20k.scaled_size(100, 300, 100, ratio)
        rows = ade20k.nearest_indices(100, h)
        columns = ade20k.nearest_indices(300, w)
        scaled = label[rows][:, columns]

        want, again = replayed_crop(scaled, rng, 50)
        redrawn += again
        if rng.random() < 0.5:
            want = want[:, ::-1]

        rng = ReplayedRng(seed)
        _, got, _ = ade20k.train_transform(image, label, rng, crop=50, short=100)
        assert (got == want).all()

    assert redrawn > 10


def test_padding_is_zero_after_normalisation_and_pixels_follow_the_formula():
    images = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    sizes = torch.tensor([[6, 8], [4, 5]])
    first, second = ade20k.normalise(images, sizes)
    below = second[:, 4:]
    right = second[:, :, 5:]
    assert not below.any()
    assert not right.any()

    green = images[0, 1].double()
    want = (green - 116.28) / 57.12
    got = first[1].double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    _, unpadded = ade20k.normalise(images)
    got = second[:, :4, :5]
    want = unpadded[:, :4, :5]
    torch.testing.assert_close(got, want)


# ---- reading pictures ----


def test_every_kind_of_picture_is_read_as_rgb(tmp_path):
    rgb = formulas.picture(20, 30)
    picture = Image.fromarray(rgb)
    grey = rgb[:, :, 0]
    grey_rgb = np.repeat(grey[:, :, None], 3, axis=2)
    wide = grey.astype(np.uint16) * 256 + 77
    sixteen = Image.fromarray(wide)
    quantised = picture.quantize(16)
    rgba = np.dstack([rgb, grey])
    files = {
        "grey.png": (Image.fromarray(grey), grey_rgb),
        "rgba.png": (Image.fromarray(rgba), rgb),
        "palette.png": (quantised, np.asarray(quantised.convert("RGB"))),
        "sixteen.png": (sixteen, grey_rgb),
        "sixteen.tif": (sixteen, grey_rgb),
        "cmyk.tif": (picture.convert("CMYK"), rgb),
    }

    for name, (file, want) in files.items():
        path = str(tmp_path / name)
        file.save(path)
        got = ade20k.load_image(path)
        assert got.dtype == np.uint8
        assert got.shape == (20, 30, 3)
        assert largest_error(got, want) <= 1, name

    path = str(tmp_path / "turned.png")
    exif = Image.Exif()
    exif[274] = 6  # "turn me by 90 degrees", as phones write it
    picture.save(path, exif=exif)
    got = ade20k.load_image(path)
    turned = np.rot90(rgb, -1)
    assert (got == turned).all()


def exif_block(orientation):
    """An EXIF block with two entries: how the camera was held, and a resolution that is text, which
    nobody can write again."""
    entries = struct.pack("<HHIHH", 274, 3, 1, orientation, 0)
    entries += struct.pack("<HHI4s", 282, 2, 3, b"72")

    content = b"Exif\0\0II*\0"
    content += struct.pack("<IH", 8, 2)
    content += entries
    content += struct.pack("<I", 0)
    return content


def test_orientation_is_read_whatever_else_the_exif_block_holds(tmp_path):
    y, x = np.mgrid[:200:10, :210:7]
    channels = [y, x, (x + y) // 2]  # smooth, for jpeg
    rgb = np.stack(channels, axis=2)
    rgb = rgb.astype(np.uint8)
    upright = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb),
        9: rgb,  # there is no such orientation
    }
    files = [
        ("x.png", {}, 0),
        ("x.webp", {"lossless": True}, 0),
        ("x.jpg", {}, 3),
    ]

    for orientation, want in upright.items():
        for name, options, allowed in files:
            path = str(tmp_path / name)
            save(path, rgb, exif=exif_block(orientation), **options)
            got = ade20k.load_image(path).astype(int)
            assert got.shape == want.shape, (name, orientation)
            error = np.abs(got - want)
            assert error.mean() <= allowed, (name, orientation)

    # A TIFF has its orientation among its own tags.
    path = str(tmp_path / "x.tif")
    save(path, rgb, tiffinfo={274: 6})
    got = ade20k.load_image(path)
    assert (got == upright[6]).all()


def test_bad_metadata_is_no_reason_to_refuse_good_pixels_and_cut_pixels_are(tmp_path):
    rgb = formulas.picture(20, 30)
    text = PngInfo()
    text.add_text("prompt", "y" * 3_000_000, zip=True)
    text.add_itxt("more", "y" * 3_000_000, zip=True)
    save(tmp_path / "text.png", rgb, pnginfo=text)
    save(tmp_path / "exif.png", rgb, exif=b"Exif\0\0garbage")
    for name in ("text.png", "exif.png"):
        got = ade20k.load_image(str(tmp_path / name))
        assert (got == rgb).all(), name

    cut = tmp_path / "cut.jpg"
    save(cut, rgb, exif=exif_block(6))
    whole = cut.read_bytes()
    write(cut, whole[:-200])
    refused("cut.jpg: cannot be read as a picture: .*truncated", ade20k.load_image, str(cut))


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A few kilobytes of png that say they are 60000 x 60000 pixels."""
    rows = bytes(1 << 20)
    bomb = png_file(60000, 60000, 8, 2, rows)
    path = tmp_path / "bomb.png"
    write(path, bomb)
    message = "bomb.png: cannot be read as a picture: .* 178 million pixels, cut it into tiles"
    refused(message, ade20k.load_image, str(path))


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: started.append(command))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n0 0 moveto\n%%EOF\n"
    path = tmp_path / "cat.jpg"
    write(path, eps)
    with contextlib.suppress(Exception), Image.open(path) as file:
        file.load()
    assert started, "this file does start it where nobody looks"

    started.clear()
    refused("cat.jpg: cannot be read as a picture: ", ade20k.load_image, str(path))
    refused("cat.jpg: cannot identify", ade20k.load_label, str(path))
    assert started == []


def test_pixels_whose_range_nobody_knows_are_refused(tmp_path):
    path = str(tmp_path / "x.tif")
    depth = np.linspace(0, 1, 600, dtype=np.float32)
    Image.fromarray(depth.reshape(20, 30)).save(path)
    refused("x.tif: cannot be read as a picture: ", ade20k.load_image, path)


# ---- reading labels ----


def png_file(width, height, bits, colour_type, rows):
    """A png, byte by byte, since Pillow writes none of 2 or 4 bits, and no colours of 16."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    content += chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(rows))
    content += chunk(b"IEND", b"")
    return content


def chunk(kind, data):
    length = struct.pack(">I", len(data))
    check = struct.pack(">I", crc32(kind + data))
    return length + kind + data + check


def grey_png(bits, rows):
    """A grey png of 1, 2, 4, 8 or 16 bits."""
    content = b""
    for row in rows:
        digits = ""
        for value in row:
            digits += f"{value:0{bits}b}"
        while len(digits) % 8 > 0:
            digits += "0"

        size = len(digits) // 8
        number = int(digits, 2)
        content += b"\0" + number.to_bytes(size, "big")

    height = len(rows)
    width = len(rows[0])
    return png_file(width, height, bits, 0, content)


def test_labels_shift_once_and_zero_becomes_ignored(tmp_path):
    path = str(tmp_path / "a.png")
    every_value = np.arange(151)
    save(path, every_value.reshape(1, -1))
    label = ade20k.load_label(path)
    assert label.tolist() == [[255, *range(150)]]


def test_labels_of_every_depth_are_read_by_their_values(tmp_path):
    path = str(tmp_path / "x.png")
    classes = plain_classes("abc")
    shifted = plain_classes("abc", zero_ignored=True)
    for bits in (1, 8, 16):
        rows = [[0, 1, 2], [2, 1, 0]]
        if bits == 1:
            rows = [[0, 1, 1], [1, 0, 0]]

        write(path, grey_png(bits, rows))

        got = ade20k.load_label(path, classes)
        assert got.dtype == np.uint8
        assert got.tolist() == rows, bits

        got = ade20k.load_label(path, shifted)
        rows = np.array(rows)
        want = np.where(rows == 0, 255, rows - 1)
        assert got.dtype == np.uint8
        assert got.tolist() == want.tolist(), bits

    # 256 would become 255, "not labelled", if it were shifted or cut to 8 bits before it is judged.
    lists = (classes, plain_classes("ab", zero_ignored=True))
    for value in (3, 200, 256, 511, 65535):
        png = grey_png(16, [[0, value]])
        write(path, png)
        message = f"x.png: holds {value}, which is neither a class nor ignored"
        for each in lists:
            refused(message, ade20k.load_label, path, each)

    png = grey_png(16, [[255, 2]])
    write(path, png)
    label = ade20k.load_label(path, classes)
    assert label.tolist() == [[255, 2]]


def test_labels_of_a_palette_are_its_indices_at_every_depth(tmp_path):
    path = str(tmp_path / "x.png")
    rows = [[0, 1, 1, 0], [1, 1, 0, 0]]
    picture = Image.fromarray(np.array(rows, np.uint8))
    for bits in (1, 2, 4, 8):
        picture.putpalette(bytes(3 * 2**bits))
        picture.save(path)
        with Image.open(path) as file:
            assert f"P;{bits}" in str(file.tile) or bits == 8
        got = ade20k.load_label(path, plain_classes("ab"))
        assert got.tolist() == rows, bits


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_labels_that_pillow_stretches_are_refused(bits, tmp_path):
    path = str(tmp_path / "x.png")
    write(path, grey_png(bits, [[0, 1, 2], [2, 1, 0]]))
    coloured = plain_classes("abc")._replace(ignored_colours=[])
    for classes in (Classes(), coloured):
        refused("x.png: .*may change labels, save as 8-bit png", ade20k.load_label, path, classes)


def test_labels_that_are_no_integers_from_0_on_are_refused(tmp_path):
    path = str(tmp_path / "x.tif")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(path)
    refused("x.tif: .*float32.*int64", ade20k.load_label, path)

    faults = {-1: "holds -1, which is neither", 70000: "index 70000 is out of bounds"}
    for value, what in faults.items():
        Image.fromarray(np.full((4, 4), value, np.int32)).save(path)
        for zero_ignored in (False, True):
            classes = plain_classes("abc", zero_ignored)
            refused(f"x.tif: {what}", ade20k.load_label, path, classes)


def test_labels_in_a_format_that_loses_are_refused_by_what_the_file_is(tmp_path):
    label = str(tmp_path / "p0.png")
    formats = {
        "JPEG": {"quality": 100},
        "WEBP": {},
        "TIFF": {"compression": "jpeg"},
        "JPEG2000": {"irreversible": True},
        "GIF": {},
    }
    for kind, options in formats.items():
        save(label, np.ones((40, 60)), kind, **options)
        message = f"p0.png: is a {kind} file that may change labels"
        refused(message, ade20k.load_label, label)


def test_labels_in_every_format_that_loses_nothing_are_read(tmp_path):
    numbers = np.arange(40 * 60)
    values = numbers.reshape(40, 60) % 5
    rgb = np.repeat(values[:, :, None], 3, axis=2)
    classes = plain_classes("abcde")
    colours = classes._replace(ignored_colours=[])
    for name in ("a.png", "a.tif", "a.bmp", "b.tif"):
        options = {"compression": "tiff_lzw"} if name == "b.tif" else {}
        path = str(tmp_path / name)
        for pixels, meaning in ((values, classes), (rgb, colours)):
            save(path, pixels, **options)
            got = ade20k.load_label(path, meaning)
            assert (got == values).all(), name


def test_labels_in_colours_are_read_through_the_class_list(small_set):
    label = small_set + "/annotations/training/p0.png"
    write_classes(small_set, "colours\nignore 255 255 255\nsky 0 0 200\nroad 128 64 128\n")
    classes = ade20k.read_classes(small_set)
    rows = [[0, 1, 255, 0], [1, 1, 0, 255]]
    want = np.array(rows, np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    colours[0] = [0, 0, 200]
    colours[1] = [128, 64, 128]
    colours[255] = [255, 255, 255]
    rgb = colours[want]

    picture = Image.fromarray(rgb)
    forms = [picture, picture.quantize(8), picture.convert("RGBA")]
    for written in forms:
        written.save(label)
        got = ade20k.load_label(label, classes)
        assert got.dtype == np.uint8
        assert (got == want).all(), written.mode

    rgb[1, 2] = 0, 0, 201
    save(label, rgb)
    message = r"p0.png: holds \[ *0 +0 +201\], which is neither a class nor ignored"
    refused(message, ade20k.load_label, label, classes)


def test_a_mask_of_black_and_white_is_read_through_the_class_list(small_set):
    label = small_set + "/annotations/training/p0.png"
    write_classes(small_set, "colours\nbackground 0 0 0\nlesion 255 255 255\n")
    classes = ade20k.read_classes(small_set)
    values = [[0, 255, 255], [255, 0, 0]]
    mask = Image.fromarray(np.array(values, np.uint8))
    want = [[0, 1, 1], [1, 0, 0]]

    forms = [mask, mask.convert("1"), mask.convert("RGB")]
    for written in forms:
        written.save(label)
        got = ade20k.load_label(label, classes)
        assert got.tolist() == want, written.mode


def test_colours_of_16_bits_are_refused(small_set):
    """Pillow reads the upper 8 bits of colours, and every grey above 255 as white."""
    label = small_set + "/annotations/training/p0.png"
    write_classes(small_set, "colours\nsky 1 2 3\nroad 255 255 255\n")
    classes = ade20k.read_classes(small_set)
    message = "p0.png: has 16 bits a colour"
    rgb = [0x0109, 0x0209, 0x0309]
    rgba = [0x0101, 0x0202, 0x0303, 65535]
    for colour_type, pixel in ((2, rgb), (6, rgba)):
        numbers = struct.pack(f">{len(pixel)}H", *pixel)
        row = b"\0" + numbers
        png = png_file(1, 1, 16, colour_type, row)
        write(label, png)
        refused(message, ade20k.load_label, label, classes)

    png = grey_png(16, [[300, 65535]])
    write(label, png)
    refused(message, ade20k.load_label, label, classes)


# ---- classes.txt ----


def write_classes(root, text, encoding="utf-8"):
    with open(root + "/classes.txt", "w", encoding=encoding, newline="") as file:
        file.write(text)


def test_classes_of_ones_own_are_read_with_and_without_colours(small_set):
    official = ade20k.read_classes(small_set)
    assert official == Classes()
    assert official.names == ade20k.CLASSES
    assert official.palette == ade20k.PALETTE.tolist()

    lines = "blue sky 70 130 180\n  mur \u00e0 gauche\nroute 66\n"
    for head in ("", "ignore 0\n\n"):
        write_classes(small_set, head + lines, "utf-8-sig")
        classes = ade20k.read_classes(small_set)
        assert classes.names == ("blue sky", "mur \u00e0 gauche", "route 66")
        assert classes.palette[0] == [70, 130, 180]
        different = set(map(tuple, classes.palette))
        assert len(different) == 3
        assert classes.zero_ignored == bool(head)


def test_unlabelled_is_255_or_0_as_the_class_list_says(small_set):
    label = small_set + "/annotations/training/p0.png"
    save(label, [[0, 1, 2, 255]])
    classes = plain_classes("abc")
    got = ade20k.load_label(label, classes)
    assert got.tolist() == [[0, 1, 2, 255]]
    message = "p0.png: holds 2, which is neither a class nor ignored"
    refused(message, ade20k.load_label, label, plain_classes("ab"))

    shifted = plain_classes("abc", zero_ignored=True)
    got = ade20k.load_label(label, shifted)
    assert got.tolist() == [[255, 0, 1, 255]]


@pytest.mark.parametrize("head,most", [("", 255), ("ignore 0\n", 254)])
def test_255_is_no_class_however_many_there_are(head, most, small_set):
    write_classes(small_set, head + "\n".join(map(str, range(most))))
    classes = ade20k.read_classes(small_set)
    label = small_set + "/annotations/training/p0.png"
    save(label, [[1, 254, 255]])
    first = int(classes.zero_ignored)
    got = ade20k.load_label(label, classes)
    assert got.tolist() == [[1 - first, 254 - first, 255]]
    if head:
        assert (got == reduce_zero_label([[1, 254, 255]])).all()


def reduce_zero_label(values):
    """mmsegmentation 0.17, LoadAnnotations, on a copy."""
    label = np.array(values, np.uint8)
    label[label == 0] = 255
    label = label - np.uint8(1)
    label[label == 254] = 255
    return label


@pytest.mark.parametrize("head", ["ignore 0\n", "ignore 0\nignore 255\n", "ignore 255\nignore 0\n"])
def test_where_0_is_unlabelled_255_is_too_as_in_the_reference(head, small_set):
    write_classes(small_set, head + "sky\nroad\n")
    classes = ade20k.read_classes(small_set)
    assert classes.names == ("sky", "road")
    label = small_set + "/annotations/training/p0.png"
    values = [[0, 1, 2, 255, 1]]
    save(label, values)
    got = ade20k.load_label(label, classes)
    assert (got == reduce_zero_label(values)).all()
    save(label, [[0, 1, 3]])
    refused("p0.png: holds 3, which is neither", ade20k.load_label, label, classes)


def test_comments_and_settings_in_any_case_are_no_classes(small_set):
    plain = Classes(("sky", "road"), [[1, 2, 3], [4, 5, 6]], False)
    ignored = [[9, 9, 9], [8, 8, 8]]
    heads = {
        "# my data\n\n  # more\n": plain,
        "Ignore 0\n": plain._replace(zero_ignored=True),
        "# ADE20K's way\nIGNORE  0\r\n": plain._replace(zero_ignored=True),
        "ignore 255\n": plain,
        "Colours\n": plain._replace(ignored_colours=[]),
        "colors\nignore 9 9 9\nIgnore 8 8 8\n": plain._replace(ignored_colours=ignored),
    }
    for head, want in heads.items():
        write_classes(small_set, head + "sky 1 2 3  # blue\n# in between\nroad 4 5 6\n")
        assert ade20k.read_classes(small_set) == want, head


def test_colours_may_be_hexadecimal_at_the_end_of_a_line(small_set):
    write_classes(small_set, "cat #307020\nred #fox # 1 2 3\nC#abcdef\nsea #0000FF\t\nart #30702\n")
    classes = ade20k.read_classes(small_set)
    assert classes.names == ("cat", "red", "C#abcdef", "sea", "art")
    assert classes.palette[0] == [0x30, 0x70, 0x20]
    assert classes.palette[3] == [0, 0, 255]

    write_classes(small_set, "colours\nignore #ffffff\ncat #307020\n")
    want = Classes(("cat",), [[48, 112, 32]], False, [[255, 255, 255]])
    assert ade20k.read_classes(small_set) == want


def test_names_that_look_like_settings_or_colours_are_names(small_set):
    names = ("coloursplash", "area 51", "1 2 3", "C# code", "ignored", "re ignore 0")
    write_classes(small_set, "\n".join(names))
    assert ade20k.read_classes(small_set).names == names


def test_a_class_list_that_is_not_utf_8_is_refused(small_set):
    text = "ciel\nmur \u00e0 gauche\n"
    for encoding in ("utf-8", "utf-8-sig"):
        write_classes(small_set, text, encoding)
        classes = ade20k.read_classes(small_set)
        assert classes.names == ("ciel", "mur \u00e0 gauche"), encoding

    for encoding in ("utf-16", "latin-1"):
        write_classes(small_set, text, encoding)
        refused("classes.txt: 'utf-8' codec can't decode", ade20k.read_classes, small_set)


def test_a_class_list_that_cannot_be_opened_is_an_error(small_set):
    os.symlink(small_set + "/nowhere.txt", small_set + "/classes.txt")
    refused("classes.txt: No such file", ade20k.read_classes, small_set)


def test_fields_of_classes_in_old_checkpoints_are_understood():
    """They are stored as plain tuples, in this order."""
    stored = (("a", "b"), [[1, 2, 3], [4, 5, 6]], False, [[9, 9, 9]])
    classes = Classes(*stored)
    assert classes == stored
    assert classes.names == ("a", "b")
    assert classes.palette == [[1, 2, 3], [4, 5, 6]]
    assert classes.zero_ignored is False
    assert classes.ignored_colours == [[9, 9, 9]]


FIRST = "must be the first line"
OWN = "needs a name and, with `colours`, a colour of its own"
UNUSABLE = [
    ("", "must name 1 to 255 classes"),
    ("ignore 0\n", "must name 1 to 255 classes"),
    ("# only this\n", "must name 1 to 255 classes"),
    ("\n".join(map(str, range(256))), "must name 1 to 255 classes"),
    ("ignore 0\n" + "\n".join(map(str, range(255))), "must name 1 .* with `ignore 0` 1 to 254"),
    ("sky\nroad\nsky 1 2 3\n", "'sky 1 2 3': " + OWN),
    ("sky 1 2 256", r"'sky 1 2 256': .*range\(0, 256\)"),
    ("ignore 7\nsky", "'ignore 7': .*" + FIRST),
    ("ignore\nsky", "'ignore': .*" + FIRST),
    ("name,r,g,b\nsky,1,2,3", "'name,r,g,b': .*a class is `name` or `name R G B`"),
    ("ignore region", "'ignore region': .*" + FIRST),
    ("sky\nignore 0\nroad", "'ignore 0': .*" + FIRST),
    ("sky\ncolours\nroad", "'colours': .*" + FIRST),
    ("ignore 1 2 3\nsky", "'ignore 1 2 3': .*`ignore R G B` needs `colours`"),
    ("colours\nignore 0\nsky 1 2 3", "'ignore 0': " + OWN),
    ("ignore 0\ncolours\nsky 1 2 3", "'colours': .*" + FIRST),
    ("colours\nignore 1 2 256\nsky 1 2 3", "'ignore 1 2 256': "),
    ("colours\nsky 1 2 3\nroad", "'road': " + OWN),
    ("colours\nsky 1 2 3\nroad 1 2 3", "'road 1 2 3': " + OWN),
    ("colours\nignore 1 2 3\nsky 1 2 3", "'sky 1 2 3': " + OWN),
]


@pytest.mark.parametrize("text,message", UNUSABLE)
def test_class_lists_that_cannot_be_used_are_refused_by_line(text, message, small_set):
    write_classes(small_set, text)
    refused("classes.txt: " + message, ade20k.read_classes, small_set)


def test_colours_of_twenty_classes_without_any_can_be_told_apart(small_set):
    names = [f"thing {letter}" for letter in "abcdefghijklmnopqrst"]
    write_classes(small_set, "\n".join(names))
    palette = ade20k.read_classes(small_set).palette
    assert len(palette) == 20

    for first, second in itertools.combinations(palette, 2):
        difference = np.subtract(first, second)
        distance = np.abs(difference).sum()
        assert distance >= 45, (first, second)


def test_classes_and_palette_are_the_official_ones(sample):
    official = loadmat(os.path.join(sample, "color150.mat"))
    assert (ade20k.PALETTE == official["colors"]).all()

    with open(os.path.join(sample, "objectInfo150.csv")) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 150
    different = set(ade20k.CLASSES)
    assert len(different) == 150
    for name, row in zip(ade20k.CLASSES, rows):
        first = name.split()[0]
        theirs = row["Name"]
        words = theirs.replace(";", " ").split()
        assert first in words, (name, theirs)


# ---- finding the files, and their faults ----


def test_faults_are_named_with_file_and_value(small_set):
    image = small_set + "/images/training/p1.jpg"
    label = small_set + "/annotations/training/p1.png"
    assert len(ade20k.find_pairs(small_set, "training")) == 2

    save_label(label, 151)
    refused("p1.png: holds 151, which is neither a class nor ignored", ade20k.load, image, label)
    save(label, np.ones((41, 60)))
    sizes = r"p1.jpg: .* height and width \(40, 60\), its label file \(41, 60\)"
    refused(sizes, ade20k.load, image, label)
    save(label, np.ones((40, 60, 3)))
    sizes = r"p1.jpg: .* \(40, 60\), its label file \(40, 60, 3\), .*one channel"
    refused(sizes, ade20k.load, image, label)
    save(label, np.full((40, 60, 3), 200))
    refused("p1.png: holds 200, .*`colours` where they are colours", ade20k.load_label, label)

    with open(image, "rb") as file:
        beginning = file.read(400)
    for damage in (b"", b"no picture at all", beginning):
        write(image, damage)
        refused("p1.jpg: cannot be read as a picture: ", ade20k.load_image, image)


def test_a_sample_that_cannot_be_used_is_named_with_what_to_do(small_set):
    pairs = ade20k.find_pairs(small_set, "training")
    write(pairs[0][0], b"no picture at all")
    data = ade20k.TrainSet(pairs, seed=0)
    message = "a fault in the data .`python ade20k.py check DIR` names all.: .*p0.jpg: cannot"

    def read_all():
        return [data[position] for position in range(2)]

    refused(message, read_all)


def test_folders_and_files_that_are_missing_are_named(small_set):
    os.remove(small_set + "/annotations/training/p1.png")
    find = ade20k.find_pairs
    message = "set: each picture in images/training needs one label file of its name .* not so: "
    refused(message + "p1$", find, small_set, "training")
    none = r": no such folder, or no pictures in it \(save HEIC as JPEG\); a data set holds"
    refused("set/images/validation" + none, find, small_set, "validation")
    advice = ".* download data/ade.*--data toy"
    refused("nowhere/images/training" + none + advice, find, small_set + "/nowhere", "training")

    os.remove(small_set + "/images/training/p0.jpg")
    refused(message + "p0, p1$", find, small_set, "training")


def test_pictures_of_every_format_and_any_case_of_suffix_are_found(small_set):
    images = small_set + "/images/validation/"
    labels = small_set + "/annotations/validation/"
    names = ["a.tif", "b.WEBP", "c.bmp", "d.JPG", "e.Jpeg", "f.PNG", "g.ppm", "h.jfif"]
    picture = formulas.picture(8, 9)
    for name in names:
        save(images + name, picture)
    for name in ("a.png", "b.PNG", "c.tif", "d.bmp", "e.png", "f.PNG", "g.tif", "h.bmp"):
        save(labels + name, np.ones((8, 9)))
    for name in ("notes.txt", "Thumbs.db", "a.json"):
        write(images + name, b"no picture")

    pairs = ade20k.find_pairs(small_set, "validation")
    found = [os.path.basename(image) for image, _ in pairs]
    assert found == names
    for pair in pairs:
        image, _ = ade20k.load(*pair)
        assert image.shape == (8, 9, 3)


def test_pictures_in_folders_are_found_by_their_whole_names_without_hidden_files(small_set):
    """As Cityscapes has its cities, and macOS a ._x.png beside each x.png."""
    for kind in ("images", "annotations"):
        top = f"{small_set}/{kind}/training"
        for folder in ("ulm", "bonn/old", ".trash"):
            os.makedirs(f"{top}/{folder}")
            save_label(f"{top}/{folder}/Street_leftImg8bit.png", 1)
        write(f"{top}/._p0.png", b"no picture")
        write(f"{top}/ulm/._Street_leftImg8bit.jpg", b"no picture")
        write(f"{top}/ulm/notes.txt", b"no picture")

    pairs = ade20k.find_pairs(small_set, "training")
    stems = ["bonn/old/Street_leftImg8bit", "p0", "p1", "ulm/Street_leftImg8bit"]
    for (image, label), stem in zip(pairs, stems, strict=True):
        assert os.path.splitext(image)[0] == f"{small_set}/images/training/{stem}"
        assert label == f"{small_set}/annotations/training/{stem}.png"

    os.remove(f"{small_set}/annotations/training/ulm/Street_leftImg8bit.png")
    message = "each picture in images/training .* not so: ulm/Street_leftImg8bit$"
    refused(message, ade20k.find_pairs, small_set, "training")


def odd_pictures():
    """Files that are read, but not as they were meant: {name: what is said of it}"""
    dark = np.arange(2400).reshape(40, 60)
    bright = np.full((40, 60), 255, np.int32)
    page = Image.fromarray(formulas.picture(40, 60))
    twelve = Image.fromarray((dark + 1696).astype(np.uint16))  # up to 4095
    return {
        "twelve.png": (twelve, {}, "is very dark"),
        "bits32.tif": (Image.fromarray(bright), {}, "is very dark"),
        "pages.tif": (page, dict(save_all=True, append_images=[page]), "holds several pages"),
    }


def test_pictures_that_are_read_otherwise_than_meant_are_said_and_others_not(small_set, capsys):
    for split in ("images", "annotations"):
        os.rmdir(f"{small_set}/{split}/validation")
    for name, (picture, options, _) in odd_pictures().items():
        picture.save(f"{small_set}/images/training/{name}", **options)
        save_label(f"{small_set}/annotations/training/{name_of(name)}.png", 1)

    # What is not odd: a phone's JPEG of two frames, and 16 bits of which all are used.
    frame = Image.fromarray(formulas.picture(40, 60))
    path = f"{small_set}/images/training/phone.jpg"
    frame.save(path, "MPO", save_all=True, append_images=[frame])
    full = np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27
    Image.fromarray(full).save(f"{small_set}/images/training/full.png")
    for name in ("phone", "full"):
        save_label(f"{small_set}/annotations/training/{name}.png", 2)

    assert ade20k.check(small_set) == []
    lines = capsys.readouterr().out.splitlines()
    for name, (_, _, words) in odd_pictures().items():
        assert any(f"{name} {words}" in line for line in lines), name
    for name in ("phone.jpg", "full.png", "p0.jpg"):
        assert not any(name in line for line in lines), name

    classes = plain_classes("ab", zero_ignored=True)
    pairs = ade20k.find_pairs(small_set, "training")
    (warning,) = ade20k.data_warnings("training", pairs, classes)
    for name, (_, _, words) in odd_pictures().items():
        assert f"{name} {words}" in warning
    assert "phone.jpg" not in warning


def test_a_picture_turned_by_exif_whose_label_is_not_is_said_with_all_sizes(small_set):
    image = small_set + "/images/training/p1.jpg"
    picture = Image.fromarray(formulas.picture(40, 60))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(image, exif=exif)
    message = (
        r"p1.jpg: the picture, turned as its EXIF block says, has height and width \(60, 40\), "
        r"its label file \(40, 60\)"
    )
    pairs = ade20k.find_pairs(small_set, "training")
    refused(message, ade20k.load, *pairs[1])
    refused(message, list, ade20k.data_warnings("training", pairs, Classes()))
    for kind in ("images", "annotations"):
        os.rmdir(f"{small_set}/{kind}/validation")
    (fault,) = ade20k.check(small_set)
    assert "turned as its EXIF block says, has height and width (60, 40), its label" in fault

    picture.save(image)
    assert ade20k.check(small_set) == []


@pytest.mark.parametrize("partner", ["kept", "gone"])
@pytest.mark.parametrize(
    "twin,other",
    [
        ("images/training/p0.png", "annotations/training/p0.png"),
        ("annotations/training/p1.tif", "images/training/p1.jpg"),
    ],
)
def test_two_files_of_one_name_are_a_fault_by_name(twin, other, partner, small_set):
    save(f"{small_set}/{twin}", np.ones((40, 60)))
    name = name_of(twin)
    if partner == "gone":  # two files, but not one of each kind
        os.remove(f"{small_set}/{other}")
    message = f"each picture in images/training needs one label file .*, not so: {name}$"
    refused(message, ade20k.find_pairs, small_set, "training")
    refused(message, ade20k.check, small_set)


def test_a_set_without_validation_is_legal_where_that_is_asked_for(small_set, capsys):
    find = ade20k.find_pairs
    assert find(small_set, "validation", optional=True) == []
    label = small_set + "/annotations/validation/alone.png"
    save_label(label, 1)
    os.rmdir(small_set + "/images/validation")
    message = "each picture in images/validation needs .* in annotations/validation, .*: alone$"
    refused(message, find, small_set, "validation", True)

    os.remove(label)
    os.rmdir(small_set + "/annotations/validation")
    assert find(small_set, "validation", optional=True) == []
    refused("images/validation: no such folder", find, small_set, "validation")
    assert ade20k.check(small_set) == []
    assert "validation: 0 of 0 pictures can be used" in capsys.readouterr().out


def test_labels_that_teach_nothing_are_warned_of(small_set):
    pairs = ade20k.find_pairs(small_set, "training")
    classes = plain_classes(["back", "front"])

    def warnings(*values):
        for value, (_, label) in zip(values, pairs):
            save_label(label, value)
        return list(ade20k.data_warnings("training", pairs, classes))

    assert warnings(0, 1) == []
    assert warnings(0, 255) == [  # a mask, read as numbers: 255 is "not labelled"
        "training: none of the 2 label files that were looked at holds a pixel of front"
    ]
    assert warnings(255, 255) == [
        "training: none of the 2 label files that were looked at holds a pixel of back, front"
    ]
    refused("p0.png: holds 7, which", warnings, 7, 1)


def test_many_labels_are_looked_at_evenly_and_rare_classes_are_not_missed(monkeypatch):
    seen = []
    classes = plain_classes("abcdefgh")
    pairs = [("", str(i)) for i in range(1000)]

    def look_at(pair, classes):
        position = int(pair[1])
        seen.append(position)
        count = 7 if position % 8 == 0 else 3
        return (1, count), np.bincount(range(count), minlength=256), ""

    monkeypatch.setattr(ade20k, "look_at", look_at)
    look = ade20k.data_warnings
    assert list(look("validation", pairs, classes)) == []  # only h is not there
    assert 200 <= len(seen) <= 300
    assert max(seen) >= 996
    gaps = np.diff(seen)
    assert set(gaps) == {4}

    three = np.bincount(range(3), minlength=256)
    monkeypatch.setattr(ade20k, "look_at", lambda pair, classes: ((1, 3), three, ""))
    assert list(look("validation", pairs, classes)) == [
        "validation: none of the 250 label files that were looked at holds a pixel of "
        "d, e, f, g, h"
    ]


def test_a_warning_names_twenty_missing_classes_and_counts_the_others(small_set):
    pairs = ade20k.find_pairs(small_set, "training")  # whose labels hold 1 and 2
    (warning,) = ade20k.data_warnings("training", pairs, Classes())

    missing = ", ".join(ade20k.CLASSES[2:22])
    words = "training: none of the 2 label files that were looked at holds a pixel of"
    assert warning == f"{words} {missing}, and 128 more"


def test_check_reports_every_fault_by_file_in_one_pass(small_set):
    images = small_set + "/images/training/"
    labels = small_set + "/annotations/training/"
    write(images + "bad.jpg", b"not a jpeg")
    save(labels + "bad.png", np.ones((9, 9)))
    save_label(labels + "p0.png", 200)
    os.rmdir(small_set + "/images/validation")
    os.rmdir(small_set + "/annotations/validation")

    script = os.path.join(ROOT, "ade20k.py")
    command = [sys.executable, script, "check", small_set]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    faults = [line for line in lines if "FAULT" in line]
    assert len(faults) == 2
    for name in ("bad.jpg", "p0.png"):
        named = [fault for fault in faults if name in fault]
        assert named, name

    assert "training: 1 of 3 pictures can be used" in done.stdout
    assert "height and width [40 60] to [40 60]" in done.stdout
    for name, numbers in (("building", "100.00% 1"), ("(not labelled)", "0.00% 0")):
        (row,) = [line for line in lines if name in line]
        share, pictures = numbers.split()
        assert row.split() == [*name.split(), share, "of", "the", "pixels,", pictures, "pictures"]


def test_check_looks_for_partners_before_it_reads_anything(small_set, monkeypatch):
    monkeypatch.setattr(ade20k, "load", None)
    save_label(small_set + "/annotations/validation/alone.png", 1)
    refused("set: each picture in images/validation .* not so: alone$", ade20k.check, small_set)


def test_check_prints_names_from_files_in_one_line_each(small_set, capsys):
    for split in ("images", "annotations"):
        os.rmdir(f"{small_set}/{split}/validation")
    write_classes(small_set, "ignore 0\nwall\x1b[2J\nroad\n")
    image = small_set + "/images/training/p\n1.jpg"
    label = small_set + "/annotations/training/p\n1.png"
    os.rename(small_set + "/images/training/p1.jpg", image)
    save_label(label, 9)
    os.remove(small_set + "/annotations/training/p1.png")
    (fault,) = ade20k.check(small_set)
    assert "holds 9" in fault

    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"wall\x1b[2J" in out
    assert r"p\n1.png: holds 9" in out


def test_an_interrupted_check_ends_at_once_and_quietly(small_set):
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        folder = f"{small_set}/{kind}/training"
        good = f"{folder}/p0{suffix}"
        for i in range(3000):
            os.link(good, f"{folder}/q{i}{suffix}")
        os.rmdir(f"{small_set}/{kind}/validation")

    code = """if True:
        import os, signal, ade20k

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
        read, calls = ade20k.load, []

        def interrupt(*pair):
            calls.append(pair)
            if len(calls) >= 50 and calls[49] is pair:  # (there are several threads)
                os.kill(os.getpid(), signal.SIGINT)
            return read(*pair)

        ade20k.load = interrupt
        try:
            ade20k.main()
        finally:
            print(len(calls))
    """
    command = [sys.executable, "-c", code, "check", small_set]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == ""
    assert int(done.stdout) < 1000


# ---- samples ----


def test_samples_depend_on_seed_and_position_alone(small_set):
    pairs = ade20k.find_pairs(small_set, "training")
    data = ade20k.TrainSet(pairs, seed=3, crop=32, short=48)
    direct = [data[position] for position in range(12)]

    def compare(start, rank, world, workers):
        """The batches of one process from iteration `start` on: six pictures in all."""
        order = list(ade20k.sample_positions(start, 2, 6, rank, world))
        assert len(order) == 2 - start
        loader = torch.utils.data.DataLoader(data, batch_sampler=iter(order), num_workers=workers)

        share = 6 // world
        for i, batch in enumerate(loader, start=start):
            first = 6 * i + rank * share
            for j in range(share):
                want = direct[first + j]
                for got, expected in zip(batch, want, strict=True):
                    assert torch.equal(got[j], expected)

    for workers, world in ((0, 1), (2, 1), (0, 2), (1, 3)):
        for rank in range(world):
            compare(0, rank, world, workers)
            compare(1, rank, world, workers)

    other = ade20k.TrainSet(pairs, seed=4, crop=32, short=48)
    equal = []
    for position in range(4):
        image = other[position][0]
        first_image = direct[position][0]
        equal.append(torch.equal(image, first_image))
    assert not all(equal)


def test_every_pass_over_the_data_sees_every_picture_once():
    names = [str(i) for i in range(7)]
    pairs = [(name, "") for name in names]
    data = ade20k.TrainSet(pairs, seed=0)
    passes = []
    for start in (0, 7, 14):
        seen = []
        for position in range(start, start + 7):
            image_path, _ = data.paths(position)
            seen.append(image_path)
        assert sorted(seen) == names
        passes.append(seen)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("seed", [0, 2**24, 20240101, 2**63 - 1])
def test_every_seed_gives_samples_of_its_own(seed, small_set):
    pairs = ade20k.find_pairs(small_set, "training")

    def images(seed):
        data = ade20k.TrainSet(pairs, seed, crop=32, short=48)
        first = data[0][0]
        far = data[10**9][0]
        return torch.stack([first, far])

    drawn = images(seed)
    assert torch.equal(drawn, images(seed))
    next_seed = (seed + 1) % 2**63
    assert not torch.equal(drawn, images(next_seed))


@pytest.mark.parametrize("height,width", [(1, 1), (1, 10000), (10000, 1), (2, 2600), (3, 5)])
def test_pictures_of_any_size_are_read_and_cut(height, width, tmp_path):
    down = height // 3 + 1
    across = width // 5 + 1
    tile = formulas.picture(3, 5)
    rgb = np.tile(tile, (down, across, 1))
    rgb = rgb[:height, :width]
    image_path = str(tmp_path / "x.png")
    label_path = str(tmp_path / "y.png")
    save(image_path, rgb)
    save(label_path, np.ones((height, width)))

    image, label = ade20k.load(image_path, label_path)
    assert (image == rgb).all()
    assert label.shape == (height, width)

    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, y, size = ade20k.train_transform(image, label, rng, crop=64, short=64)
        assert x.shape == (3, 64, 64)
        assert y.shape == (64, 64)

        h, w = size
        assert 1 <= h <= 64
        assert 1 <= w <= 64
        inside = np.zeros((64, 64), bool)
        inside[:h, :w] = True
        labelled = y == 0
        assert (labelled == inside).all()


# ---- downloading ----


def make_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def sha1(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def official(server, tmp_path, monkeypatch):
    """official(*names) makes a zip file with these names in it the one that download fetches. -> an
    empty folder for it"""
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: None)

    def offer(*names):
        make_zip(tmp_path / "offered", names)
        content = (tmp_path / "offered").read_bytes()
        os.remove(tmp_path / "offered")
        server.files["/ade.zip"] = content
        monkeypatch.setattr(ade20k, "URL", f"{server.url}/ade.zip")
        monkeypatch.setattr(ade20k, "SHA1", sha1(content))
        return tmp_path / "folder"

    return offer


PICTURE = "ADEChallengeData2016/images/training/a.jpg"


ZIP = "ADEChallengeData2016.zip"


def test_download_unpacks_once_and_asks_nobody_again(server, official):
    folder = official(PICTURE, "ADEChallengeData2016/sceneCategories.txt")
    root = ade20k.download(str(folder))
    assert (folder / PICTURE).exists()

    server.files.clear()
    assert ade20k.download(str(folder)) == root
    shutil.rmtree(root)  # stopped between fetching and unpacking: the zip is there, and is enough
    os.makedirs(folder / "ADEChallengeData2016.part/ADEChallengeData2016/images")
    assert ade20k.download(str(folder)) == root
    assert (folder / PICTURE).exists()
    files = os.listdir(folder)
    assert sorted(files) == ["ADEChallengeData2016", ZIP]


def test_download_takes_a_zip_that_was_fetched_by_other_means(server, official):
    folder = official(PICTURE)
    os.makedirs(folder)
    write(folder / ZIP, server.files["/ade.zip"])
    server.files.clear()
    ade20k.download(str(folder))
    assert (folder / PICTURE).exists()


@pytest.mark.parametrize("kept", [0, 50])
def test_a_zip_that_is_not_whole_is_named_and_left_alone(kept, server, official):
    folder = official(PICTURE)
    os.makedirs(folder)
    part = server.files["/ade.zip"][:kept]
    write(folder / ZIP, part)
    refused(f"{ZIP}.*: its SHA-1 is not .*: remove it", ade20k.download, str(folder))
    assert (folder / ZIP).read_bytes() == part
    assert os.listdir(folder) == [ZIP]


def test_a_zip_that_will_not_open_is_named_and_left_alone(official, monkeypatch):
    folder = official(PICTURE)
    os.makedirs(folder)
    write(folder / ZIP, b"no zip")
    monkeypatch.setattr(ade20k, "SHA1", sha1(b"no zip"))
    refused(f"{ZIP}.* is not a zip file", ade20k.download, str(folder))
    assert (folder / ZIP).read_bytes() == b"no zip"


def test_what_cannot_be_fetched_is_named_and_leaves_nothing_behind(server, official):
    folder = official(PICTURE)
    server.files.clear()
    refused(f"{server.url}/ade.zip: HTTP Error 404", ade20k.download, str(folder))
    assert os.listdir(folder) == []


def test_a_server_that_stalls_is_waited_for_a_minute(official, monkeypatch):
    folder = official(PICTURE)
    seconds = []
    monkeypatch.setattr(socket, "setdefaulttimeout", seconds.append)

    def fetch(url, path, *more):
        assert seconds == [60]
        raise TimeoutError("timed out")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    refused("ade.zip: timed out", ade20k.download, str(folder))
    assert seconds == [60, None]  # as it was


def test_the_readmes_download_puts_the_data_where_training_looks_for_it(
    official, tmp_path, main, monkeypatch, capsys
):
    with open(os.path.join(ROOT, "README.md")) as file:
        lines = [line.strip() for line in file]
    start = "python ade20k.py "
    commands = [line for line in lines if line.startswith(start + "download")]
    arguments = commands[0].removeprefix(start).split()

    official(PICTURE)
    monkeypatch.chdir(tmp_path)
    main(ade20k, *arguments)
    assert capsys.readouterr().out.strip() == ade20k.DEFAULT_ROOT
    assert (tmp_path / ade20k.DEFAULT_ROOT / "images/training/a.jpg").exists()


@pytest.mark.parametrize("harm", ["../../outside.txt", "/outside.txt"])
def test_download_unpacks_nothing_outside_its_folder(harm, official, tmp_path):
    folder = official(PICTURE, harm)
    with contextlib.suppress(OSError):  # of what was left over in the folder of parts
        ade20k.download(str(folder))
    assert sorted(os.listdir(tmp_path)) == ["folder"]
    assert not os.path.exists("/outside.txt")
    assert not (tmp_path.parent / "outside.txt").exists()


# ---- printing ----


@pytest.fixture
def odd_set(small_set):
    """A set whose class has a name of another alphabet, and whose second picture is damaged and has
    a name that is not UTF-8. -> its root"""
    for kind in ("images", "annotations"):
        os.rmdir(f"{small_set}/{kind}/validation")
    write_classes(small_set, "ignore 0\n\u5929\u7a7a\nroad\n")
    root = os.fsencode(small_set)
    for kind, suffix in ((b"annotations", b".png"), (b"images", b".jpg")):
        path = root + b"/" + kind + b"/training/\xff" + suffix
        os.rename(path.replace(b"\xff", b"p1"), path)
    write(path, b"no picture")
    return small_set


def check_by_shell(root, redirection="", **environment):
    """python ade20k.py check root, with a redirection of the shell's."""
    command = f"'{sys.executable}' '{ROOT}/ade20k.py' check '{root}' {redirection}"
    environment = os.environ | environment
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_printed_as_its_code(encoding, odd_set):
    done = check_by_shell(odd_set, PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert done.stderr == b""
    out = done.stdout.decode(encoding)
    sky = "\u5929\u7a7a" if encoding == "utf-8" else r"\u5929\u7a7a"
    assert f"  {sky}" in out
    assert r"\udcff.jpg: cannot be read as a picture" in out


@pytest.mark.parametrize(
    "redirection,code",
    [
        (">/dev/full", 1),
        ("| head -0", 1),
        (">&- 2>&-", 1),
        (">/dev/full 2>/dev/full", 2),
        (">&- 2>&-", 2),
    ],
)
def test_an_output_that_is_full_or_closed_changes_no_exit_code(redirection, code, odd_set):
    root = odd_set if code == 1 else odd_set + "/absent"
    done = check_by_shell(root, redirection)
    assert done.returncode == code
    assert done.stderr == b""


def test_nothing_else_prints():
    for name in ("model", "upernet", "ade20k", "evaluate", "train", "convert_weights"):
        with open(os.path.join(ROOT, name + ".py")) as file:
            assert not re.search(r"\bprint\(|std(out|err)\.write\(", file.read()), name


def test_a_line_is_cut_before_it_fills_the_terminal(capsys):
    ade20k.say("x" * 10**6, "a\x1b[2Jb\nc")
    long, short = capsys.readouterr().out.splitlines()
    assert len(long) < 10**4
    assert short == r"a\x1b[2Jb\nc"
