"""The toy data set: what the newcomer's first command draws."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import ade20k

SPLITS = [("training", 96), ("validation", 24)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder in which ade20k.py, from another folder, was told to draw `toy`."""
    folder = tmp_path_factory.mktemp("drawn")
    command = [sys.executable, os.path.join(ROOT, "ade20k.py"), "toy", "toy"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "toy\n"
    return folder


def test_the_same_seed_draws_the_same_bytes():
    one = ade20k.draw_scene(np.random.default_rng(3))
    same = ade20k.draw_scene(np.random.default_rng(3))
    other = ade20k.draw_scene(np.random.default_rng(4))
    for a, b, c in zip(one, same, other):
        assert a.dtype == np.uint8
        assert a.tobytes() == b.tobytes()
        assert a.tobytes() != c.tobytes()
    assert one[0].shape == (192, 256, 3)
    assert one[1].shape == (192, 256)


def test_the_toy_set_is_as_described(drawn, capsys):
    root = str(drawn / "toy")
    assert os.listdir(drawn) == ["toy"]  # no half-made folder is left

    classes = ade20k.read_classes(root)
    assert len(classes.names) == 13
    everywhere = set(range(1, 14))
    unlabelled = []
    for split, count in SPLITS:
        pairs = ade20k.find_pairs(root, split)
        assert len(pairs) == count

        seen = set()
        for _, label_path in pairs:
            values = np.asarray(Image.open(label_path))
            assert values.shape == (192, 256)
            seen |= set(np.unique(values).tolist())
            unlabelled.append((values == 0).mean())
        assert seen == {0} | everywhere  # so that no class is absent from the first table

    assert 0.001 < np.mean(unlabelled) < 0.05
    assert ade20k.check(root) == []
    assert "WARNING" not in capsys.readouterr().out


def test_its_classes_have_the_names_and_colours_of_ade20k(drawn):
    classes = ade20k.read_classes(str(drawn / "toy"))
    ade = ade20k.Classes()
    for name, colour in zip(classes.names, classes.palette):
        assert colour == ade.palette[ade.names.index(name)], name


def test_picture_and_label_show_the_same_scene(drawn):
    """Drawn by one loop, saved as two files: their names must go together. The sky, which lies
    above, and grass, which is green, tell."""
    sky, grass = 2, 5
    for image_path, label_path in ade20k.find_pairs(str(drawn / "toy"), "training")[:20]:
        image = np.asarray(Image.open(image_path)).astype(int)
        label = np.asarray(Image.open(label_path))
        rows, _ = np.nonzero(label == sky)
        assert rows.mean() < 80
        if (label == grass).mean() > 0.1:
            red, green, blue = image[label == grass].mean(axis=0)
            assert green > blue + 20


def test_every_thing_and_class_of_the_tables_exists():
    """What a scene asks for by name is in the tables, and the tables hold nothing in vain."""
    things = {line[0] for line in ade20k.rows(ade20k.THINGS)}
    names = {line[0] for line in ade20k.rows(ade20k.TOY_CLASSES)}
    placed, meant = set(), {"sky"}
    for scene in ade20k.SCENES:
        ground, crowds = map(ade20k.rows, scene.split("\n\n"))
        edges = [float(edge) for _, _, edge in ground]
        assert edges == sorted(edges)
        placed |= {line[0] for line in crowds}
        meant |= {line[0] for line in ground} | {line[1] for line in crowds}
    assert placed == things
    assert meant == names


def test_a_toy_set_that_is_there_is_left_as_it_is(drawn):
    root = str(drawn / "toy")
    before = os.stat(root).st_mtime_ns

    assert ade20k.make_toy(root) == root
    assert os.stat(root).st_mtime_ns == before


def fail(*args):
    raise OSError("No space left on device")


def test_a_drawing_that_breaks_off_leaves_no_set(tmp_path, monkeypatch):
    monkeypatch.setattr(ade20k.Path, "write_text", fail)
    monkeypatch.setattr(ade20k, "draw_scene", lambda rng: (np.zeros((2, 2), np.uint8),) * 2)
    root = str(tmp_path / "toy")
    with pytest.raises(OSError, match="No space"):
        ade20k.make_toy(root)
    assert not os.path.exists(root)


def test_of_two_that_draw_at_once_the_first_wins(tmp_path, monkeypatch):
    root = str(tmp_path / "toy")

    def draw(rng):  # while this one draws, another process finishes
        os.makedirs(root, exist_ok=True)
        with open(f"{root}/classes.txt", "w") as file:
            file.write("of the other")
        return (np.zeros((2, 2), np.uint8),) * 2

    monkeypatch.setattr(ade20k, "draw_scene", draw)
    assert ade20k.make_toy(root) == root
    assert os.listdir(tmp_path) == ["toy"]
    assert os.listdir(root) == ["classes.txt"]


def test_a_drawing_that_cannot_be_moved_into_place_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ade20k, "draw_scene", lambda rng: (np.zeros((2, 2), np.uint8),) * 2)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        ade20k.make_toy(str(tmp_path / "toy"))
    assert os.listdir(tmp_path) == []
