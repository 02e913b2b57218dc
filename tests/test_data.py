"""ade20k.py against the real reference's transforms (goldens), plain loops, and damaged files."""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from zlib import crc32

import formulas
import numpy as np
import pytest
import toy
import torch
from conftest import ROOT, ReplayedRng
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ade20k
from ade20k import DataError


def pairs_of(folder, split):
    return ade20k.find_pairs(folder, split)


# ---- transforms ----


def test_training_geometry_replays_the_references_random_stream(sample, golden, monkeypatch):
    gold = golden("transforms")
    monkeypatch.setattr(ade20k, "distort", lambda image, rng: image)
    for i, (image_path, label_path) in enumerate(pairs_of(sample, "training")):
        image, label = ade20k.load(image_path, label_path)
        for seed in (0, 1, 2):
            rng, key = ReplayedRng(1000 * i + seed), f"{os.path.basename(image_path)[:-4]}_{seed}"
            x, y, size = ade20k.train_transform(image, label, rng)
            assert (
                x.shape == (3, 512, 512)
                and y.shape == (512, 512)
                and x.dtype == y.dtype == np.uint8
            )
            assert (
                crc32(np.ascontiguousarray(y).tobytes()) == gold[key + "_label"]
            ), "labels are exact to the last pixel"
            error = np.abs(x.reshape(3, -1).T[::397].astype(int) - gold[key + "_image"])
            assert error.max() <= 1, key
            assert rng.random() == gold[key + "_next"], "as many random numbers were drawn"
            assert (y[size[0] :] == 255).all() and (y[:, size[1] :] == 255).all()


def test_distortion_replays_the_reference_within_one_level(golden):
    gold = golden("transforms")
    for seed in range(24):
        image = formulas.picture(seed=seed).transpose(2, 0, 1)
        got = ade20k.distort(image, ReplayedRng(seed)).transpose(1, 2, 0)[::5, ::5]
        assert np.abs(got.astype(int) - gold[f"distort_{seed}"]).max() <= 1, seed


def test_test_resize_equals_cv2_within_one_level_on_real_pictures(sample, golden):
    gold = golden("transforms")
    for split in ("training", "validation"):
        for image_path, _ in pairs_of(sample, split):
            image = ade20k.load_image(image_path)
            for ratio in (0.5, 1.0, 1.75):
                key = f"test_{os.path.basename(image_path)[:-4]}_{ratio}"
                h, w = ade20k.scaled_size(*image.shape[:2], int(2048 * ratio), int(512 * ratio))
                assert (h, w) == tuple(gold[key + "_size"])
                got = ade20k.resize_bilinear(image, h, w).reshape(3, -1).T[::797].astype(int)
                assert np.abs(got - gold[key]).max() <= 1, key


def test_resize_of_a_box_is_the_box_of_the_resize():
    image = formulas.picture(61, 83)
    for h, w in ((61, 83), (40, 50), (122, 170), (20, 300)):
        whole = ade20k.resize_bilinear(image, h, w)
        for box in ((0, 0, h, w), (3, 5, 17, 40), (h - 7, w - 9, h, w)):
            y0, x0, y1, x1 = box
            part = ade20k.resize_bilinear(image, h, w, box)
            assert (part == whole[:, y0:y1, x0:x1]).all()


def test_resize_is_plain_bilinear_interpolation():
    image, (h, w) = formulas.picture(7, 9), (11, 5)
    got = ade20k.resize_bilinear(image, h, w)
    for y in range(h):
        for x in range(w):
            sy, sx = np.clip((y + 0.5) * 7 / h - 0.5, 0, 6), np.clip((x + 0.5) * 9 / w - 0.5, 0, 8)
            (ty, fy), (tx, fx) = divmod(sy, 1), divmod(sx, 1)
            ty, tx = int(ty), int(tx)
            by, bx = min(ty + 1, 6), min(tx + 1, 8)
            want = (1 - fy) * ((1 - fx) * image[ty, tx] + fx * image[ty, bx]) + fy * (
                (1 - fx) * image[by, tx] + fx * image[by, bx]
            )
            assert np.abs(got[:, y, x] - want).max() <= 0.5 + 1e-3


def test_crop_is_redrawn_while_one_class_fills_it():
    """A plain replay of the rule: draw until two classes or more share the crop below 75%, at most
    ten times."""
    label, image = np.zeros((100, 300), np.uint8), np.zeros((100, 300, 3), np.uint8)
    label[:60, :60], label[70:, 200:] = 1, 255
    redrawn = 0
    for seed in range(40):
        rng = ReplayedRng(seed)
        ratio = rng.random() * 1.5 + 0.5
        h, w = ade20k.scaled_size(100, 300, int(400 * ratio), int(100 * ratio))
        large = label[ade20k.nearest_indices(100, h)][:, ade20k.nearest_indices(300, w)]
        for attempt in range(11):
            y, x = rng.integers(0, max(h - 50, 0) + 1), rng.integers(0, max(w - 50, 0) + 1)
            want = large[y : y + 50, x : x + 50]
            counts = np.unique(want[want != 255], return_counts=True)[1]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        redrawn += attempt > 0
        want = want[:, ::-1] if rng.random() < 0.5 else want
        got = ade20k.train_transform(image, label, ReplayedRng(seed), crop=50, short=100)[1]
        assert (got == want).all()
    assert redrawn > 10


def test_padding_is_zero_after_normalisation_and_pixels_follow_the_formula():
    images = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    x = ade20k.normalise(images, torch.tensor([[6, 8], [4, 5]]))
    assert (x[1, :, 4:] == 0).all() and (x[1, :, :, 5:] == 0).all()
    want = (images[0, 1].double() - 116.28) / 57.12
    torch.testing.assert_close(x[0, 1].double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x[1, :, :4, :5], ade20k.normalise(images)[1, :, :4, :5])


# ---- reading ----


def test_labels_shift_once_and_zero_becomes_ignored(tmp_path):
    values = np.arange(151, dtype=np.uint8).reshape(1, -1)
    Image.fromarray(values).save(tmp_path / "a.png")
    label = ade20k.load_label(str(tmp_path / "a.png"))
    assert label[0, 0] == 255 and (label[0, 1:] == np.arange(150)).all()


def test_every_kind_of_picture_is_read_as_rgb(tmp_path):
    rgb = formulas.picture(20, 30)
    grey = rgb[:, :, 0]
    picture, files = Image.fromarray(rgb), {}
    files["grey.png"] = (Image.fromarray(grey), np.repeat(grey[:, :, None], 3, 2))
    files["rgba.png"] = (Image.fromarray(np.dstack([rgb, grey])), rgb)
    quantised = picture.quantize(16)
    files["palette.png"] = (quantised, np.asarray(quantised.convert("RGB")))
    files["sixteen.png"] = (
        Image.fromarray(grey.astype(np.uint16) * 256 + 77),
        np.repeat(grey[:, :, None], 3, 2),
    )
    files["sixteen.tif"] = files["sixteen.png"]
    files["cmyk.tif"] = (picture.convert("CMYK"), rgb)
    for name, (file, want) in files.items():
        file.save(tmp_path / name)
        got = ade20k.load_image(str(tmp_path / name))
        assert got.dtype == np.uint8 and got.shape == (20, 30, 3)
        assert np.abs(got.astype(int) - want).max() <= 1, name
    exif = Image.Exif()
    exif[274] = 6  # "turn me by 90 degrees", as phones write it
    picture.save(tmp_path / "turned.png", exif=exif)
    assert (ade20k.load_image(str(tmp_path / "turned.png")) == np.rot90(rgb, -1)).all()


def exif_block(orientation):
    """An EXIF block with two entries: how the camera was held, and a resolution that is text, which
    nobody can write again."""
    entries = struct.pack("<HHIHH", 274, 3, 1, orientation, 0)
    entries += struct.pack("<HHI4s", 282, 2, 3, b"72")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


def test_orientation_is_read_whatever_else_the_exif_block_holds(tmp_path):
    y, x = np.mgrid[:200:10, :210:7]
    rgb = np.stack([y, x, (x + y) // 2], axis=2).astype(np.uint8)  # smooth, for jpeg
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
    for orientation, want in upright.items():
        for name, options in (("x.png", {}), ("x.webp", {"lossless": True}), ("x.jpg", {})):
            path = str(tmp_path / name)
            Image.fromarray(rgb).save(path, exif=exif_block(orientation), **options)
            got = ade20k.load_image(path).astype(int)
            assert got.shape == want.shape, (name, orientation)
            allowed = 3 if name == "x.jpg" else 0
            assert np.abs(got - want).mean() <= allowed, (name, orientation)

    # A TIFF has its orientation among its own tags.
    Image.fromarray(rgb).save(tmp_path / "x.tif", tiffinfo={274: 6})
    assert (ade20k.load_image(str(tmp_path / "x.tif")) == upright[6]).all()


def test_bad_metadata_is_no_reason_to_refuse_good_pixels_and_cut_pixels_are(tmp_path):
    rgb = formulas.picture(20, 30)
    text = PngInfo()
    text.add_text("prompt", "y" * 3_000_000, zip=True)
    text.add_itxt("more", "y" * 3_000_000, zip=True)
    Image.fromarray(rgb).save(tmp_path / "text.png", pnginfo=text)
    Image.fromarray(rgb).save(tmp_path / "exif.png", exif=b"Exif\0\0garbage")
    for name in ("text.png", "exif.png"):
        assert (ade20k.load_image(str(tmp_path / name)) == rgb).all(), name

    Image.fromarray(rgb).save(tmp_path / "cut.jpg", exif=exif_block(6))
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) - 200])
    with pytest.raises(DataError, match="cut.jpg: cannot be read as a picture .*truncated"):
        ade20k.load_image(str(tmp_path / "cut.jpg"))


def png(bits, rows, colour_type=0):
    """A grey png of 1, 2, 4, 8 or 16 bits, byte by byte, since Pillow writes no 2 and 4."""
    height, per_row = len(rows), len(rows[0])
    row_bits = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
    padded = [row + "0" * (-len(row) % 8) for row in row_bits]
    lines = [bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8)) for row in padded]
    header = struct.pack(">IIBBBBB", per_row, height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND")


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))


def test_labels_of_every_depth_are_read_by_their_values(tmp_path):
    classes = ade20k.Classes(tuple("abc"), [[k, k, k] for k in range(3)], zero_ignored=False)
    shifted = classes._replace(zero_ignored=True)
    path = str(tmp_path / "x.png")
    for bits in (1, 2, 4, 8, 16):
        rows = [[0, 1, 1], [1, 0, 0]] if bits == 1 else [[0, 1, 2], [2, 1, 0]]
        with open(path, "wb") as file:
            file.write(png(bits, rows))
        got = ade20k.load_label(path, classes)
        assert got.dtype == np.uint8 and got.tolist() == rows, bits
        want = [[255 if value == 0 else value - 1 for value in row] for row in rows]
        got = ade20k.load_label(path, shifted)
        assert got.dtype == np.uint8 and got.tolist() == want, bits

    # 256 would become 255, "not labelled", if it were shifted or cut to 8 bits before it is judged.
    for value in (3, 200, 256, 511, 65535):
        with open(path, "wb") as file:
            file.write(png(16, [[0, value]]))
        for each in (classes, shifted._replace(names=("a", "b"))):
            with pytest.raises(DataError, match=f"x.png: label {value} is above the"):
                ade20k.load_label(path, each)
    with open(path, "wb") as file:
        file.write(png(16, [[255, 2]]))
    assert ade20k.load_label(path, classes).tolist() == [[255, 2]]


def test_labels_in_a_format_that_loses_are_refused_by_what_the_file_is(small_set):
    label = small_set + "/annotations/training/p0.png"
    grey = Image.fromarray(np.ones((40, 60), np.uint8))
    for kind, options in (
        ("JPEG", {"quality": 100}),
        ("WEBP", {}),
        ("TIFF", {"compression": "jpeg"}),
        ("JPEG2000", {"irreversible": True}),
        ("GIF", {}),
    ):
        grey.save(label, kind, **options)
        for read in (
            lambda: ade20k.load_label(label),
            lambda: ade20k.find_pairs(small_set, "training"),
        ):
            with pytest.raises(DataError, match=f"p0.png: is a {kind} file that may change labels"):
                read()


def test_labels_in_every_format_that_loses_nothing_are_read(tmp_path):
    values = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60) % 5
    for name, options in (
        ("a.png", {}),
        ("a.tif", {}),
        ("b.tif", {"compression": "tiff_lzw"}),
        ("a.bmp", {}),
        ("a.tga", {}),
        ("a.pgm", {}),
        ("a.pcx", {}),
    ):
        Image.fromarray(values).save(tmp_path / name, **options)
        classes = ade20k.Classes(tuple("abcde"), [[k, k, k] for k in range(5)], False)
        assert (ade20k.load_label(str(tmp_path / name), classes) == values).all(), name

    colours = classes._replace(ignored_colours=[])
    rgb = np.repeat(values[:, :, None], 3, axis=2)
    for name, options in (("a.webp", {"lossless": True, "exact": True}), ("a.png", {})):
        Image.fromarray(rgb).save(tmp_path / name, **options)
        assert (ade20k.load_label(str(tmp_path / name), colours) == values).all(), name


@pytest.fixture
def small_set(tmp_path):
    """Two good pictures in ADE20K's layout. -> its root"""
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            os.makedirs(tmp_path / "set" / kind / split)
    for i in range(2):
        Image.fromarray(formulas.picture(40, 60, seed=i)).save(
            tmp_path / f"set/images/training/p{i}.jpg"
        )
        Image.fromarray(np.full((40, 60), 1 + i, np.uint8)).save(
            tmp_path / f"set/annotations/training/p{i}.png"
        )
    return str(tmp_path / "set")


def test_faults_are_named_with_file_and_value(small_set):
    image, label = small_set + "/images/training/p1.jpg", small_set + "/annotations/training/p1.png"
    assert len(ade20k.find_pairs(small_set, "training")) == 2
    Image.fromarray(np.full((40, 60), 151, np.uint8)).save(label)
    with pytest.raises(DataError, match="p1.png: label 151 is above the 150 classes"):
        ade20k.load(image, label)
    Image.fromarray(np.ones((41, 60), np.uint8)).save(label)
    for find in (
        lambda: ade20k.load(image, label),
        lambda: ade20k.find_pairs(small_set, "training"),
    ):
        with pytest.raises(DataError, match=r"p1.jpg.*40.*p1.png.*41"):
            find()
    Image.fromarray(np.ones((40, 60, 3), np.uint8)).save(label)
    with pytest.raises(DataError, match="p1.png: labels must be one channel"):
        ade20k.load_label(label)
    for damage in (b"", b"no picture at all", open(image, "rb").read()[:400]):
        with open(image, "wb") as file:
            file.write(damage)
        with pytest.raises(DataError, match="p1.jpg: cannot be read"):
            ade20k.load_image(image)
    os.remove(label)
    with pytest.raises(DataError, match="p1.jpg: its label file .*p1.png is missing"):
        ade20k.find_pairs(small_set, "training")
    with pytest.raises(DataError, match="holds no"):
        ade20k.find_pairs(small_set, "validation")
    with pytest.raises(DataError, match="nowhere.*training: no such folder; a data set holds"):
        ade20k.find_pairs(small_set + "/nowhere", "training")
    with pytest.raises(DataError, match="no such folder; `python ade20k.py download data/ade`"):
        ade20k.find_pairs(ade20k.DEFAULT_ROOT, "training")


def test_classes_of_ones_own_are_read_with_and_without_colours_and_ignore(small_set):
    assert ade20k.read_classes(small_set) == ade20k.Classes()
    assert (
        ade20k.Classes().names == ade20k.CLASSES
        and ade20k.Classes().palette == ade20k.PALETTE.tolist()
    )
    label, path = small_set + "/annotations/training/p0.png", small_set + "/classes.txt"
    values = np.array([[0, 1, 2, 255]], np.uint8)
    Image.fromarray(values).save(label)
    for head, want in (("", [0, 1, 2, 255]), ("ignore 0\n\n", None)):
        with open(path, "w", encoding="utf-8-sig") as file:
            file.write(head + "blue sky 70 130 180\n  mur \u00e0 gauche\nroute 66\n")
        classes = ade20k.read_classes(small_set)
        assert classes.names == ("blue sky", "mur \u00e0 gauche", "route 66") and classes.palette[
            0
        ] == [70, 130, 180]
        assert len({tuple(c) for c in classes.palette}) == 3 and classes.zero_ignored == bool(head)
        if want:
            assert ade20k.load_label(label, classes).tolist() == [want]
            with pytest.raises(
                DataError, match="p0.png: label 2 is above the 2 classes, 255 is for unlabelled"
            ):
                ade20k.load_label(
                    label, ade20k.Classes(classes.names[:2], classes.palette[:2], False)
                )
        else:
            with pytest.raises(
                DataError, match="p0.png: label 255 is above the 3 classes, 0 is for unlabelled"
            ):
                ade20k.load_label(label, classes)
            Image.fromarray(values[:, :3]).save(label)
            assert ade20k.load_label(label, classes).tolist() == [[255, 0, 1]]


def write_classes(root, text, encoding="utf-8"):
    with open(root + "/classes.txt", "w", encoding=encoding, newline="") as file:
        file.write(text)


def test_comments_and_settings_in_any_case_are_no_classes(small_set):
    plain = ade20k.Classes(("sky", "road"), [[1, 2, 3], [4, 5, 6]], False)
    for head, want in (
        ("# my data\n\n  # more\n", plain),
        ("Ignore 0\n", plain._replace(zero_ignored=True)),
        ("# ADE20K's way\nIGNORE  0\r\n", plain._replace(zero_ignored=True)),
        ("ignore 255\n", plain),
        ("Colours\n", plain._replace(ignored_colours=[])),
        ("colors\nignore 9 9 9\nIgnore 8 8 8\n",
         plain._replace(ignored_colours=[[9, 9, 9], [8, 8, 8]])),
    ):
        write_classes(small_set, head + "sky 1 2 3  # blue\n# in between\nroad 4 5 6\n")
        assert ade20k.read_classes(small_set) == want, head


def test_class_lists_that_are_not_utf_8_are_refused_by_line(small_set):
    text = "ciel\nmur \u00e0 gauche\n"
    for encoding in ("utf-8", "utf-8-sig"):
        write_classes(small_set, text, encoding)
        assert ade20k.read_classes(small_set).names == ("ciel", "mur \u00e0 gauche"), encoding
    for encoding, line in (("utf-16", 1), ("utf-16-le", 1), ("utf-16-be", 1), ("latin-1", 2)):
        write_classes(small_set, text, encoding)
        with pytest.raises(DataError, match=f"classes.txt, line {line}: .*save the file as UTF-8"):
            ade20k.read_classes(small_set)


def test_labels_in_colours_are_read_through_the_class_list(small_set):
    label = small_set + "/annotations/training/p0.png"
    write_classes(small_set, "colours\nignore 255 255 255\nsky 0 0 200\nroad 128 64 128\n")
    classes = ade20k.read_classes(small_set)
    want = np.array([[0, 1, 255, 0], [1, 1, 0, 255]], np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    colours[[0, 1, 255]] = [0, 0, 200], [128, 64, 128], [255, 255, 255]
    picture = Image.fromarray(colours[want])
    for written in (picture, picture.quantize(8), picture.convert("RGBA")):
        written.save(label)
        got = ade20k.load_label(label, classes)
        assert got.dtype == np.uint8 and (got == want).all(), written.mode

    wrong = colours[want]
    wrong[1, 2] = 0, 0, 201
    Image.fromarray(wrong).save(label)
    with pytest.raises(DataError, match="p0.png: the pixel at x = 2, y = 1 has the colour 0 0 201"):
        ade20k.load_label(label, classes)


def test_a_mask_of_black_and_white_is_read_through_the_class_list(small_set):
    label = small_set + "/annotations/training/p0.png"
    write_classes(small_set, "colours\nbackground 0 0 0\nlesion 255 255 255\n")
    classes = ade20k.read_classes(small_set)
    mask = Image.fromarray(np.array([[0, 255, 255], [255, 0, 0]], np.uint8))
    for written in (mask, mask.convert("1"), mask.convert("RGB")):
        written.save(label)
        assert ade20k.load_label(label, classes).tolist() == [[0, 1, 1], [1, 0, 0]], written.mode


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "0 classes"),
        ("ignore 0\n", "0 classes"),
        ("sky\nroad\nsky 1 2 3\n", "line 3: 'sky 1 2 3'"),
        ("sky 1 2 256", "line 1: 'sky 1 2 256' has a colour above 255"),
        ("\n".join(map(str, range(256))), "256 classes"),
        ("# only this\n", "0 classes"),
        ("ignore 7\nsky", "line 1: 'ignore 7' must be `ignore 0`, `ignore 255` or"),
        ("ignore\nsky", "line 1: 'ignore' must be"),
        ("sky\nignore 0\nroad", "line 2: 'ignore 0' must .* stand above the first class"),
        ("sky\ncolours\nroad", "line 2: 'colours' must .* stand above the first class"),
        ("ignore 1 2 3\nsky", "line 1: 'ignore 1 2 3' must .* below `colours`"),
        ("colours\nignore 0\nsky 1 2 3", "line 2: 'ignore 0' must"),
        ("ignore 0\ncolours\nsky 1 2 3", "line 2: 'colours' must"),
        ("colours\nignore 1 2 256\nsky 1 2 3", "line 2: 'ignore 1 2 256' "),
        ("colours\nsky 1 2 3\nroad", "line 3: 'road' has no colour of its own"),
        ("colours\nsky 1 2 3\nroad 1 2 3", "line 3: 'road 1 2 3' has no colour of its own"),
        ("colours\nignore 1 2 3\nsky 1 2 3", "line 3: 'sky 1 2 3' has no colour of its own"),
    ],
)
def test_class_lists_that_cannot_be_used_are_refused_by_line(text, message, small_set):
    write_classes(small_set, text)
    with pytest.raises(DataError, match=r"classes.txt.*" + message):
        ade20k.read_classes(small_set)


def test_colours_of_twenty_classes_without_any_can_be_told_apart(small_set):
    with open(small_set + "/classes.txt", "w") as file:
        file.write("\n".join(f"thing {chr(97 + k)}" for k in range(20)))
    palette = np.array(ade20k.read_classes(small_set).palette)
    distance = np.abs(palette[:, None] - palette[None]).sum(2) + 999 * np.eye(20)
    assert distance.min() >= 45, distance.min()


def test_a_folder_near_a_data_set_or_of_the_wrong_release_is_recognised(small_set, tmp_path):
    for wrong in (
        os.path.dirname(small_set),
        small_set + "/images",
        small_set + "/images/training",
    ):
        with pytest.raises(DataError, match=f"use --data {small_set}$"):
            ade20k.find_pairs(wrong, "training")
    os.makedirs(tmp_path / "ADE20K_2021_17_01" / "images" / "ADE" / "training")
    with pytest.raises(DataError, match="full ADE20K release of 2021.*download"):
        ade20k.find_pairs(str(tmp_path / "ADE20K_2021_17_01"), "training")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(small_set):
    """A few kilobytes of png that say they are 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    with open(small_set + "/images/training/p0.jpg", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header))
        file.write(chunk(b"IDAT", data) + chunk(b"IEND"))
    with pytest.raises(DataError, match="p0.jpg: cannot be read .*decompression bomb"):
        ade20k.find_pairs(small_set, "training")


def test_pictures_of_every_format_and_any_case_of_suffix_are_found(small_set):
    images, labels = small_set + "/images/validation/", small_set + "/annotations/validation/"
    names = ["a.tif", "b.WEBP", "c.bmp", "d.JPG", "e.Jpeg", "f.PNG", "g.ppm", "h.jfif"]
    for name in names:
        Image.fromarray(formulas.picture(8, 9)).save(images + name)
    for stem, suffix in zip("abcdefgh", [".png", ".PNG", ".tif", ".bmp"] * 2):
        Image.fromarray(np.ones((8, 9), np.uint8)).save(labels + stem + suffix)
    for name in ("notes.txt", "Thumbs.db", "a.json"):
        with open(images + name, "w") as file:
            file.write("no picture")

    pairs = ade20k.find_pairs(small_set, "validation")
    assert [os.path.basename(image) for image, _ in pairs] == names
    assert all(ade20k.load(*pair)[0].shape == (8, 9, 3) for pair in pairs)


def test_two_files_of_one_name_are_a_fault_by_name(small_set, capsys):
    for folder, twin in (("images", "p0.png"), ("annotations", "p1.tif")):
        path = f"{small_set}/{folder}/training/{twin}"
        Image.fromarray(np.ones((40, 60), np.uint8)).save(path)
        with pytest.raises(DataError, match=f"{twin}: has the name of .*{twin[:2]}"):
            ade20k.find_pairs(small_set, "training")
        shutil.rmtree(small_set + "/images/validation", ignore_errors=True)
        shutil.rmtree(small_set + "/annotations/validation", ignore_errors=True)
        assert ade20k.check(small_set) == 1 and "FAULT " in capsys.readouterr().out
        os.remove(path)


def test_two_spellings_of_an_accent_are_one_name(small_set):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    Image.fromarray(formulas.picture(8, 9)).save(f"{small_set}/images/validation/{composed}.jpg")
    label = f"{small_set}/annotations/validation/{decomposed}.png"
    Image.fromarray(np.ones((8, 9), np.uint8)).save(label)
    (pair,) = ade20k.find_pairs(small_set, "validation")
    assert composed in pair[0] and decomposed in pair[1]


def test_a_set_without_validation_is_legal_where_that_is_asked_for(small_set, capsys):
    with pytest.raises(DataError, match="validation: holds no pictures"):
        ade20k.find_pairs(small_set, "validation", optional=True)
    os.rmdir(small_set + "/images/validation")
    with pytest.raises(DataError, match="images/validation: no such folder; a data set holds"):
        ade20k.find_pairs(small_set, "validation", optional=True)
    os.rmdir(small_set + "/annotations/validation")
    assert ade20k.find_pairs(small_set, "validation", optional=True) == []
    with pytest.raises(DataError, match="images/validation: no such folder"):
        ade20k.find_pairs(small_set, "validation")
    assert ade20k.check(small_set) == 0
    assert "validation: none, training goes without" in capsys.readouterr().out


def test_labels_that_teach_nothing_are_warned_of(small_set, capsys):
    pairs = ade20k.find_pairs(small_set, "training")
    classes = ade20k.Classes(("back", "front"), [[0, 0, 0], [255, 255, 255]], False)

    def warnings(*values):
        for value, (_, label) in zip(values, pairs):
            Image.fromarray(np.full((40, 60), value, np.uint8)).save(label)
        return ade20k.label_warnings(pairs, classes)

    assert warnings(0, 1) == []
    assert warnings(0, 255) == [  # a mask, read as numbers: 255 is "not labelled"
        "1 of 2 classes are in none of the training labels (2 of 2 files were looked at): front",
        "with fewer than two classes in the labels there is nothing to learn",
    ]
    missing, few = warnings(255, 255)
    assert "2 of 2 classes are in none" in missing and "nothing to learn" in few

    with open(small_set + "/classes.txt", "w") as file:
        file.write("back\nfront\n")
    assert ade20k.check(small_set) == 0  # no faults: every file can be used
    assert capsys.readouterr().out.count("WARNING ") == 2


def test_many_labels_are_looked_at_evenly_and_rare_classes_are_not_missed():
    seen = []
    classes = ade20k.Classes(tuple("abcdefgh"), [[k, k, k] for k in range(8)], False)
    pairs = [("", str(i)) for i in range(1000)]

    def read(path, classes):
        seen.append(int(path))
        return np.arange(7 if int(path) % 2 else 3, dtype=np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ade20k, "load_label", read)
        assert ade20k.label_warnings(pairs, classes, most=90) == []  # h alone is not there
        assert len(seen) == 90 and max(np.diff(sorted(seen))) <= 12 and max(seen) >= 970
        patch.setattr(ade20k, "load_label", lambda path, classes: np.arange(3, dtype=np.uint8))
        (warning,) = ade20k.label_warnings(pairs, classes, most=90)
    assert warning == (
        "5 of 8 classes are in none of the training labels (90 of 1000 files were looked at): "
        "d, e, f, g, h"
    )


def test_check_reports_every_fault_by_file_in_one_pass(small_set):
    with open(small_set + "/images/training/bad.jpg", "wb") as file:
        file.write(b"not a jpeg")
    Image.fromarray(np.ones((9, 9), np.uint8)).save(small_set + "/annotations/training/bad.png")
    Image.fromarray(np.full((40, 60), 200, np.uint8)).save(
        small_set + "/annotations/training/p0.png"
    )
    Image.fromarray(np.ones((9, 9), np.uint8)).save(small_set + "/annotations/training/alone.png")
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "ade20k.py"), "check", small_set],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    faults = [line for line in done.stdout.splitlines() if "FAULT" in line]
    assert len(faults) == 3 and all(
        any(name in f for f in faults) for name in ("bad.jpg", "p0.png", "alone.png")
    )
    assert "1 good pictures, 3 faults" in done.stdout and "building" in done.stdout


def test_an_interrupted_check_ends_at_once_and_quietly(small_set):
    image, label = (f"{small_set}/{kind}/training/p0" for kind in ("images", "annotations"))
    for i in range(3000):
        os.link(image + ".jpg", f"{small_set}/images/training/q{i}.jpg")
        os.link(label + ".png", f"{small_set}/annotations/training/q{i}.png")
    code = """if True:
        import os, signal, ade20k

        read, calls = ade20k.read_sample, []

        def interrupt(*pair, **more):
            calls.append(pair)
            if len(calls) == 50:
                os.kill(os.getpid(), signal.SIGINT)
            return read(*pair, **more)

        ade20k.read_sample = interrupt
        try:
            ade20k.main()
        finally:
            print(len(calls))
    """
    command = [sys.executable, "-c", code, "check", small_set]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "" and int(done.stdout) < 1000


# ---- samples ----


def test_samples_depend_on_seed_and_position_alone(small_set):
    pairs = ade20k.find_pairs(small_set, "training")
    data = ade20k.TrainSet(pairs, seed=3, crop=32, short=48)
    direct = [data[p] for p in range(12)]
    for workers, world in ((0, 1), (2, 1), (0, 2), (1, 3)):
        for rank in range(world):
            for start in (0, 1):
                order = list(ade20k.positions(start, 2, 6, rank, world))
                assert len(order) == 2 - start
                loader = torch.utils.data.DataLoader(
                    data, batch_sampler=iter(order), num_workers=workers
                )
                for i, batch in enumerate(loader, start=start):
                    for j in range(6 // world):
                        want = direct[6 * i + rank * (6 // world) + j]
                        assert all(torch.equal(batch[k][j], want[k]) for k in range(3))
    other = ade20k.TrainSet(pairs, seed=4, crop=32, short=48)
    assert not all(torch.equal(other[p][0], direct[p][0]) for p in range(4))


def test_every_pass_over_the_data_sees_every_picture_once():
    data = ade20k.TrainSet([(str(i), "") for i in range(7)], seed=0)
    passes = [[data.paths(7 * e + i)[0] for i in range(7)] for e in range(3)]
    assert all(sorted(p) == [str(i) for i in range(7)] for p in passes) and passes[0] != passes[1]


@pytest.mark.parametrize("seed", [0, 2**24, 20240101, 2**63 - 1])
def test_every_seed_gives_samples_of_its_own(seed, small_set):
    pairs = ade20k.find_pairs(small_set, "training")
    one, again, other = (
        [ade20k.TrainSet(pairs, s, 32, 48)[p][0] for p in (0, 10**9)]
        for s in (seed, seed, (seed + 1) % 2**63)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("height,width", [(1, 1), (1, 10000), (10000, 1), (2, 2600), (3, 5)])
def test_pictures_of_any_size_are_read_and_cut(height, width, tmp_path):
    rgb = np.tile(formulas.picture(3, 5), (height // 3 + 1, width // 5 + 1, 1))[:height, :width]
    paths = str(tmp_path / "x.png"), str(tmp_path / "y.png")
    Image.fromarray(rgb).save(paths[0])
    Image.fromarray(np.ones((height, width), np.uint8)).save(paths[1])
    assert ade20k.check_headers(*paths) is None
    image, label = ade20k.load(*paths)
    assert (image == rgb).all() and label.shape == (height, width)

    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, y, (h, w) = ade20k.train_transform(image, label, rng, crop=64, short=64)
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and 1 <= h <= 64 and 1 <= w <= 64
        assert (y[:h, :w] == 0).all() and (y == 0).sum() == h * w


# ---- the toy data set and the facts ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder in which a copy of the files, in another folder, was told to draw `toy`. -> it, and
    the command"""
    folder = tmp_path_factory.mktemp("drawn")
    copy = tmp_path_factory.mktemp("copy")
    os.makedirs(copy / "tests")
    for name in ("ade20k.py", "model.py", "upernet.py", "tests/toy.py"):
        shutil.copy(os.path.join(ROOT, name), copy / name)

    command = [sys.executable, str(copy / "ade20k.py"), "toy", "toy"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "toy", done.stderr
    return folder, command


def test_toy_set_is_deterministic_and_as_described(drawn):
    folder, _ = drawn
    root, seen, unlabelled = str(folder / "toy"), set(), []
    for s, (split, count) in enumerate((("training", 96), ("validation", 24))):
        pairs = ade20k.find_pairs(root, split)
        assert len(pairs) == count
        for i, pair in enumerate(pairs):
            image, label = ade20k.load(*pair)
            seen |= set(np.unique(label))
            unlabelled.append((label == 255).mean())
            if i < 4:  # drawn again: the same
                again, labels = toy.draw_scene(np.random.default_rng([s, i]))
                assert (np.where(labels == 0, 255, labels - 1) == label).all()
                assert np.abs(again.astype(int) - image).mean() < 6  # jpeg
    assert len(seen - {255}) >= 12 and 0.003 < np.mean(unlabelled) < 0.05

    assert os.listdir(folder) == ["toy"]  # nothing half-made is left beside it
    before = os.stat(root).st_mtime_ns
    assert ade20k.make_toy(root) == root and os.stat(root).st_mtime_ns == before


def test_the_toy_scenes_are_the_ones_that_numbers_were_measured_on():
    """Mean red, green and blue, and the pixels of the four largest labels. (Not a hash: the last
    bit of an exponential is the processor's.)"""
    scenes = [
        ([143.62, 134.76, 102.03], {3: 13577, 10: 13409, 7: 6703, 67: 4279}),
        ([145.44, 158.96, 157.88], {3: 17151, 27: 11773, 47: 10680, 26: 2228}),
        ([120.21, 143.14, 129.35], {10: 15496, 3: 13599, 7: 7772, 5: 3018}),
        ([143.71, 158.49, 156.24], {3: 18340, 27: 11038, 47: 9091, 17: 2937}),
    ]
    for i, (means, counts) in enumerate(scenes):
        image, label = toy.draw_scene(np.random.default_rng([0, i]))
        np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), means, atol=0.02)
        for value, count in counts.items():
            assert abs((label == value).sum() - count) <= 3, value


def test_a_copy_without_the_scenes_says_what_is_missing(drawn, tmp_path):
    _, command = drawn
    shutil.rmtree(os.path.join(os.path.dirname(command[1]), "tests"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and os.listdir(tmp_path) == []
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "toy.py: is missing, it draws the toy data set: copy the folder tests too" in done.stderr


def test_classes_and_palette_are_the_official_ones(sample):
    from scipy.io import loadmat

    assert (ade20k.PALETTE == loadmat(os.path.join(sample, "color150.mat"))["colors"]).all()
    import csv

    with open(os.path.join(sample, "objectInfo150.csv")) as file:
        rows = list(csv.DictReader(file))
    assert len(set(ade20k.CLASSES)) == len(rows) == 150
    for name, row in zip(ade20k.CLASSES, rows):
        assert name.split()[0] in row["Name"].replace(";", " ").split(), (name, row["Name"])


# ---- fetching ----


def test_fetch_resumes_checks_and_moves_into_place(server, tmp_path):
    content = np.random.RandomState(0).bytes(300_000)
    server.files["/a.bin"], server.faults[:] = content, [100_000, 50_000]
    path = str(tmp_path / "sub" / "a.bin")
    ade20k.fetch(server.url + "/a.bin", path, hashlib.sha1(content).hexdigest())
    assert open(path, "rb").read() == content and os.listdir(tmp_path / "sub") == ["a.bin"]
    assert server.starts == [0, 100_000, 150_000], "each try went on where the one before broke off"
    ade20k.fetch(
        server.url + "/a.bin", str(tmp_path / "b"), hashlib.sha256(content).hexdigest()[:8]
    )
    with pytest.raises(ValueError, match="hash is .* not 00000000"):
        ade20k.fetch(server.url + "/a.bin", str(tmp_path / "c"), "00000000")
    with pytest.raises(OSError, match="404"):
        ade20k.fetch(server.url + "/none", str(tmp_path / "d"))
    server.faults[:] = [1000]
    with pytest.raises(OSError, match="broke off after 1000 of 300000 bytes"):
        ade20k.fetch(server.url + "/a.bin", str(tmp_path / "e"), attempts=1)
    assert sorted(os.listdir(tmp_path)) == ["b", "e.part", "sub"]


def test_fetch_begins_anew_where_a_server_knows_no_ranges(server, tmp_path):
    content = os.urandom(200_000)
    server.files["/a"], server.faults[:], server.ranges = content, [50_000], False
    ade20k.fetch(server.url + "/a", str(tmp_path / "a"), hashlib.sha1(content).hexdigest())
    assert (tmp_path / "a").read_bytes() == content and server.starts == [0, 0]


def test_fetch_deletes_a_part_that_is_not_of_this_file_and_begins_anew(server, tmp_path):
    content = os.urandom(200_000)
    server.files["/a"] = content
    (tmp_path / "a.part").write_bytes(content + b"more")  # the server answers 416
    ade20k.fetch(server.url + "/a", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == content and server.starts == [200_004, 0]

    (tmp_path / "b.part").write_bytes(b"of another version")
    with pytest.raises(ValueError, match="hash is .*b.part is deleted"):
        ade20k.fetch(server.url + "/a", str(tmp_path / "b"), hashlib.sha1(content).hexdigest())
    assert os.listdir(tmp_path) == ["a"]

    (tmp_path / "b.part").write_bytes(content + b"more")
    with pytest.raises(OSError, match="nothing after the 200004 bytes of .*b.part, .* is deleted"):
        ade20k.fetch(server.url + "/a", str(tmp_path / "b"), attempts=1)
    assert os.listdir(tmp_path) == ["a"]


def test_fetch_survives_a_server_that_stalls_and_sees_one_that_lies_about_the_length(
    server, tmp_path
):
    content = os.urandom(200_000)
    server.files["/a"], server.faults[:] = content, [-50_000]
    ade20k.fetch(server.url + "/a", str(tmp_path / "a"), timeout=0.5)
    assert (tmp_path / "a").read_bytes() == content and server.starts == [0, 50_000]

    server.length = 300_000
    with pytest.raises(OSError, match="broke off after 200000 of"):
        ade20k.fetch(server.url + "/a", str(tmp_path / "b"), attempts=1, timeout=0.5)
    server.length = 100
    with pytest.raises(ValueError, match="hash"):
        ade20k.fetch(server.url + "/a", str(tmp_path / "c"), hashlib.sha1(content).hexdigest())


def make_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


@pytest.fixture
def official(server, tmp_path, monkeypatch):
    """official(zip file) makes it the one that download fetches. -> an empty folder for it"""

    def offer(path):
        content = path.read_bytes()
        server.files["/ade.zip"] = content
        monkeypatch.setattr(ade20k, "URL", f"{server.url}/ade.zip")
        monkeypatch.setattr(ade20k, "SHA1", hashlib.sha1(content).hexdigest())
        return tmp_path / path.stem

    return offer


def test_download_resumes_unpacks_once_and_asks_nobody_again(server, official, tmp_path):
    make_zip(
        tmp_path / "good.zip",
        ["ADEChallengeData2016/images/training/a.jpg", "ADEChallengeData2016/sceneCategories.txt"],
    )
    folder = official(tmp_path / "good.zip")
    server.faults[:] = [100, 50]
    root = ade20k.download(str(folder))
    assert os.path.exists(root + "/images/training/a.jpg") and server.starts == [0, 100, 150]
    server.files.clear()
    assert ade20k.download(str(folder)) == root
    shutil.rmtree(root)  # stopped between fetching and unpacking: the zip is there, and is enough
    os.makedirs(folder / "unpacked.part" / "ADEChallengeData2016" / "images")
    assert ade20k.download(str(folder)) == root and os.path.exists(root + "/images/training/a.jpg")
    assert sorted(os.listdir(folder)) == ["ADEChallengeData2016", "ade.zip"]


def test_the_readmes_download_puts_the_data_where_training_looks_for_it(
    official, tmp_path, monkeypatch, capsys
):
    with open(os.path.join(ROOT, "README.md")) as file:
        line = next(
            line.split() for line in file if line.startswith("    python ade20k.py download")
        )
    make_zip(tmp_path / "good.zip", ["ADEChallengeData2016/images/training/a.jpg"])
    official(tmp_path / "good.zip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", line[1:])
    ade20k.main()
    assert capsys.readouterr().out.strip() == ade20k.DEFAULT_ROOT
    assert (tmp_path / ade20k.DEFAULT_ROOT / "images/training/a.jpg").exists()


@pytest.mark.parametrize(
    "harm,message",
    [
        ("../../outside.txt", "outside.txt.*outside the folder"),
        ("/outside.txt", "outside the folder"),
    ],
)
def test_download_unpacks_nothing_of_an_archive_that_would_do_harm(
    harm, message, official, tmp_path
):
    path = tmp_path / "bad.zip"
    make_zip(path, ["ADEChallengeData2016/a.jpg", harm])
    folder = official(path)
    with pytest.raises(ValueError, match=message):
        ade20k.download(str(folder))
    assert os.listdir(folder) == ["ade.zip"] and not (tmp_path.parent / "outside.txt").exists()
