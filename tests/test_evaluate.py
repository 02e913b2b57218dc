"""evaluate.py against the reference's whole test pipeline (goldens), a slow plain loop, and the
command line."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import formulas
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import ade20k
import evaluate
from upernet import build_model

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize("mode", ["single", "multi"])
def test_label_maps_equal_the_references_on_real_pictures(mode, sample, golden, filled):
    gold = golden("evaluation")
    net = filled("small", "mln").eval()
    how = {} if mode == "single" else dict(scales=SCALES, flip=True)

    shares = []
    for image_path, _ in ade20k.find_pairs(sample, "validation"):
        image = ade20k.load_image(image_path)
        key = os.path.basename(image_path)[:-4]
        prediction = evaluate.predict(net, image, **how)
        assert prediction.shape == image.shape[:2]
        assert prediction.dtype == np.uint8

        same = (prediction[::3, ::3] == gold[f"{key}_{mode}"]).mean()
        least = 0.99 if mode == "single" else 0.98
        if mode == "single" and min(image.shape[:2]) == 512:
            least = 1  # nothing is resized: nothing may differ
        assert same >= least, (key, same)

        shares.append(same)

    assert len(shares) == 6


@pytest.mark.parametrize("mode", ["single", "multi"])
def test_label_maps_by_windows_equal_the_references_on_real_pictures(mode, sample, golden, filled):
    gold = golden("slide")
    net = filled("small", "mln").eval()
    how = {} if mode == "single" else dict(scales=(0.75, 1.25), flip=True)
    for image_path, _ in ade20k.find_pairs(sample, "validation"):
        image = ade20k.load_image(image_path)
        key = os.path.basename(image_path)[:-4]
        prediction = evaluate.predict(net, image, slide=(512, 341), **how)

        same = (prediction[::3, ::3] == gold[f"{key}_{mode}"]).mean()
        least = 0.99 if mode == "single" else 0.98
        if mode == "single" and min(image.shape[:2]) == 512:
            least = 1  # nothing is resized
        assert same >= least, (key, same)


@pytest.mark.parametrize(
    "h,w,windows",
    [
        (70, 95, 6),
        (40, 200, 6),
        (20, 30, 1),
    ],
)
def test_windows_are_summed_and_divided_by_how_often_each_pixel_was_seen(h, w, windows, small):
    net = small[0].eval()
    x = torch.from_numpy(formulas.image(h, w, batch=2))
    total = torch.zeros(2, 6, h, w)
    seen = torch.zeros(h, w)

    count = 0
    with torch.no_grad():
        steps_down = max(h - 48 + 31, 0) // 32
        steps_right = max(w - 48 + 31, 0) // 32
        for i in range(steps_down + 1):
            for k in range(steps_right + 1):
                top = max(min(32 * i, h - 48), 0)
                left = max(min(32 * k, w - 48), 0)
                rows = slice(top, top + 48)
                columns = slice(left, left + 48)
                total[:, :, rows, columns] += net(x[:, :, rows, columns])
                seen[rows, columns] += 1
                count += 1

        got = evaluate.slide_logits(net, x, torch.float32, 48, 32)

    assert count == windows
    assert seen.min() == 1
    torch.testing.assert_close(got, total / seen, rtol=1e-4, atol=1e-4)


def test_metric_equals_the_references(sample, golden):
    gold = golden("evaluation")
    matrix = 0
    for pair in ade20k.find_pairs(sample, "validation"):
        _, label = ade20k.load(*pair)
        guess = np.roll(label, 9, axis=1)
        guess[guess == 255] = 3
        matrix = matrix + evaluate.confusion_matrix(label, guess, 150)

    result = evaluate.scores(matrix)

    for name in ("IoU", "Acc"):
        ours = [np.nan if x is None else x for x in result[name]]
        theirs = 100 * gold[name]
        np.testing.assert_allclose(ours, theirs, atol=0.01)
        mean = np.nanmean(theirs)
        assert abs(result["m" + name] - mean) < 0.01

    accuracy = 100 * gold["aAcc"]
    assert abs(result["aAcc"] - accuracy) < 0.01
    absent = result["IoU"].count(None)
    assert absent > 50  # absent classes are there, as absent


def test_confusion_matrix_and_scores_equal_a_plain_loop():
    r = np.random.RandomState(0)
    both = r.randint(0, 4, (2, 9, 11))
    label, guess = both.astype(np.uint8)
    label[label == 3] = 255  # class 3 is predicted but never true, 4 neither
    matrix = evaluate.confusion_matrix(label, guess, 5)
    want = np.zeros((5, 5), int)

    for t, p in zip(label.flat, guess.flat):
        if t != 255:
            want[t, p] += 1

    assert (matrix == want).all()
    assert matrix.dtype == np.int64
    result = evaluate.scores(matrix)

    ious = []
    for k in range(4):
        true = label == k
        guessed = guess == k
        inside = (true & guessed).sum()
        either = true | guessed
        union = (either & (label != 255)).sum()
        iou = 100 * inside / union
        assert result["IoU"][k] == pytest.approx(iou)
        ious.append(iou)

    assert result["IoU"][4] is None
    assert result["Acc"][3] is None
    assert result["IoU"][3] == 0
    assert result["mIoU"] == pytest.approx(np.mean(ious))

    lines = evaluate.table(result, ("a", "b", "c", "d", "e"))
    shown = [line[0] for line in lines[1:-1]]
    assert shown == ["a", "b", "c", "d"]
    assert "(4 of 5 classes)" in lines[-1]
    assert f"{result['mIoU']:.2f}" in lines[-1]


def test_scores_of_nothing_are_none_not_zero():
    result = evaluate.scores(np.zeros((3, 3), np.int64))
    assert result["mIoU"] is result["aAcc"] is None
    assert result["IoU"] == [None] * 3
    assert evaluate.table(result, ("a", "b", "c"))[-1].count("nan") == 3


def test_multi_scale_with_flip_is_the_mean_of_softmaxes_of_single_views():
    torch.manual_seed(0)
    net = build_model("toy_p8", "none", 6).eval()
    image = formulas.picture(70, 95)
    torch.nn.init.normal_(net.decode_head.classifier.weight)

    total = 0
    for scale in (0.5, 1.0, 1.5):
        h, w = ade20k.scaled_size(70, 95, 64, scale)
        for flip in (False, True):
            x = ade20k.resize_bilinear(image, h, w)
            if flip:
                x = x[:, :, ::-1].copy()
            x = ade20k.normalise(torch.from_numpy(x)[None])
            with torch.no_grad():
                logits = torch.nn.functional.interpolate(net(x), (70, 95), mode="bilinear")
            p = logits.softmax(1)[0]
            if flip:
                p = p.flip(2)
            total = total + p

    got = evaluate.predict(net, image, (0.5, 1.0, 1.5), flip=True, short=64)
    same = got == total.argmax(0).numpy()
    assert same.mean() > 0.999


def test_a_picture_one_pixel_wide_is_labelled_and_trained_on():
    image = formulas.picture(3000, 2)[:, :1]
    label = np.arange(3000, dtype=np.uint8)[:, None] % 6
    net = build_model("toy_p8", "none", 6).eval()
    got = evaluate.predict(net, image, (0.05, 1), flip=True, short=64)

    assert got.shape == (3000, 1)
    assert ade20k.scaled_size(3000, 1, 64, 1) == (256, 1)

    rng = np.random.default_rng(0)
    x, y, size = ade20k.train_transform(image, label, rng, 32, 32)
    assert x.shape == (3, 32, 32)
    assert size[1] == 1
    assert (y[:, 1:] == 255).all()


def test_many_scales_with_flip_take_hardly_more_memory_than_the_largest_alone():
    code = """
import formulas, resource
import evaluate
from convert_weights import write_checkpoint
from upernet import build_model
model, image = build_model("toy_p8").eval(), formulas.picture(700, 1500)
for scales, flip in (((1.75,), False), ((0.5, 0.75, 1, 1.25, 1.5, 1.75), True)):
    evaluate.predict(model, image, scales, flip, short=256)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""
    paths = [ROOT, os.path.join(ROOT, "tests")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    env["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # freed memory goes back: no holes are measured
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    one, twelve = map(float, out.split())

    # The logits of all views take 23 MB as the head gives them, 500 at the picture's width, 7,500
    # at its width and height.
    assert twelve - one < 200, (one, twelve)


@pytest.mark.parametrize(
    "text,want",
    [
        ("1", (1.0,)),
        ("0.5,1,1.5", (0.5, 1.0, 1.5)),
        ("0.5,...,1.75", SCALES),
        ("1,...,0.6", (0.6, 0.85)),
    ],
)
def test_scales_are_read(text, want):
    assert evaluate.list_of_scales(text) == want


@pytest.fixture
def run(tmp_path):
    """A small trained-looking checkpoint and a folder of pictures. -> run(*arguments) of
    evaluate.py, in tmp_path"""
    torch.manual_seed(1)
    net = build_model("toy_p8", "ln")
    torch.nn.init.normal_(net.decode_head.classifier.weight)
    os.makedirs(tmp_path / "runs" / "a")
    args = dict(arch="toy_p8", neck="ln", data="set", short_side=64)
    torch.save(
        {"model": net.state_dict(), "iteration": 5, "args": args},
        tmp_path / "runs/a/checkpoint_5.pt",
    )
    (tmp_path / "runs/a/log.jsonl").touch()
    for kind in ("images", "annotations"):
        os.makedirs(tmp_path / "set" / kind / "validation")

    for i in range(5):
        size = (40 + 3 * i, 60)
        picture = Image.fromarray(formulas.picture(*size, seed=i))
        picture.save(tmp_path / f"set/images/validation/p{i}.jpg")
        label = formulas.labels(*size, seed=i)[0]
        label = np.where(label == 255, 0, label + 1).astype(np.uint8)
        Image.fromarray(label).save(tmp_path / f"set/annotations/validation/p{i}.png")

    def call(*arguments, launch=()):
        script = os.path.join(ROOT, "evaluate.py")
        command = [sys.executable, *launch, script, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    call.folder = tmp_path
    return call


def test_command_line_writes_table_json_labels_and_pictures(run):
    outputs = ("--json", "out.json", "--save-labels", "labels", "--show", "show")
    done = run(*outputs, "--flip", "--scales", "0.5,1")
    assert done.returncode == 0, done.stderr
    with open(run.folder / "out.json") as file:
        out = json.load(file)

    assert f"{out['mIoU']:8.2f}" in done.stdout
    protocol = {
        "checkpoint": os.path.join("runs", "a", "checkpoint_5.pt"),
        "data": "set",
        "split": "validation",
        "images": 5,
        "scales": [0.5, 1],
        "flip": True,
        "short_side": 64,
        "slide": 0,
        "stride": 0,
    }
    assert out["protocol"].pop("dtype") in ("float32", "bfloat16")
    assert out["protocol"] == protocol
    assert len(out["IoU"]) == 150
    assert None in out["IoU"]

    confusion = np.array(out["confusion"])
    assert confusion.shape == (150, 150)
    assert evaluate.scores(confusion)["IoU"] == out["IoU"]

    matrix = 0
    for i in range(5):  # the files alone give the same score
        written = np.asarray(Image.open(run.folder / f"labels/p{i}.png"))
        label = ade20k.load_label(str(run.folder / f"set/annotations/validation/p{i}.png"))
        assert written.min() >= 1
        matrix = matrix + evaluate.confusion_matrix(label, written - np.uint8(1), 150)

        assert Image.open(run.folder / f"show/p{i}.png").width >= 3 * (60 + 8)

    assert evaluate.scores(matrix)["mIoU"] == pytest.approx(out["mIoU"])


def test_labels_are_written_in_the_colours_of_a_data_set_in_colour(small, tmp_path):
    net, _ = small
    palette = [
        [0, 0, 0],
        [255, 255, 255],
        [9, 0, 0],
        [0, 9, 0],
        [0, 0, 9],
        [7, 7, 7],
    ]
    classes = ade20k.Classes(tuple("abcdef"), palette, False, [[1, 2, 3]])
    prediction = evaluate.predict(net.eval(), formulas.picture(40, 60), short=64)
    args = argparse.Namespace(save_labels=str(tmp_path), show=None)
    evaluate.write(args, classes, ["p.png"], 0, None, None, prediction)
    read_again = ade20k.load_label(str(tmp_path / "p.png"), classes)

    assert (read_again == prediction).all()
    assert len(np.unique(prediction)) > 1


@pytest.mark.parametrize("zero_ignored", [False, True])
@pytest.mark.parametrize("count", [3, 17, 254])
def test_saved_labels_are_seen_in_the_classes_colours_and_hold_all_values(
    count, zero_ignored, tmp_path
):
    """Pillow saves fewer bits for a palette of 16 colours or fewer, and cuts larger values."""
    names = tuple(str(k) for k in range(count))
    colours = [[k, 255 - k, 7] for k in range(count)]
    classes = ade20k.Classes(names, colours, zero_ignored)
    prediction = np.arange(count, dtype=np.uint8)
    prediction = prediction.reshape(1, -1).repeat(2, axis=0)
    args = argparse.Namespace(save_labels=str(tmp_path), show=None)
    evaluate.write(args, classes, ["p.png"], 0, None, None, prediction)

    path = str(tmp_path / "p.png")
    assert (ade20k.load_label(path, classes) == prediction).all()
    with Image.open(path) as file:
        assert file.mode == "P"
        assert len(file.getpalette()) == 3 * 256
        values = np.asarray(file)
        seen = np.asarray(file.convert("RGB"))
        nothing = 0 if zero_ignored else 255
        assert file.getpalette()[3 * nothing :][:3] == [0, 0, 0]
    assert (values == prediction + int(zero_ignored)).all()
    assert seen[0].tolist() == colours


def test_results_of_pictures_in_folders_keep_their_folders(run, main, monkeypatch, capsys):
    monkeypatch.chdir(run.folder)
    for kind in ("images", "annotations"):
        os.makedirs(f"set/{kind}/validation/ulm")
        for name in os.listdir(f"set/{kind}/validation"):
            if name.startswith("p1"):  # of one name with another in another folder
                shutil.copy(f"set/{kind}/validation/{name}", f"set/{kind}/validation/ulm/")
    main(evaluate, "--workers", 0, "--save-labels", "labels", "--show", "sheets")
    want = ["p0.png", "p1.png", "p2.png", "p3.png", "p4.png", "ulm"]
    for folder in ("labels", "sheets"):
        assert sorted(os.listdir(folder)) == want
        assert os.listdir(f"{folder}/ulm") == ["p1.png"]

    with pytest.raises(SystemExit) as end:
        main(evaluate, "--save-labels", "set/images/validation")
    assert end.value.code == 2
    os.symlink("../set/images/validation/ulm", "labels/link")
    os.rename("labels/link", "labels/ulm.old")
    shutil.rmtree("labels/ulm")
    os.rename("labels/ulm.old", "labels/ulm")  # only this folder below is one that is read
    with pytest.raises(SystemExit) as end:
        main(evaluate, "--save-labels", "labels")
    assert end.value.code == 2
    assert "labels: holds pictures" in capsys.readouterr().err


def test_scores_are_written_whatever_becomes_of_the_printed_ones(run):
    for redirection in (">/dev/full 2>/dev/full", "| head -0", ">&- 2>&-"):
        command = f"'{sys.executable}' '{ROOT}/evaluate.py' --json out.json {redirection}"
        shell = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=run.folder, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == done.stderr == b""
        out = json.loads((run.folder / "out.json").read_text())
        assert out["protocol"]["images"] == 5
        os.remove(run.folder / "out.json")


def test_scores_appear_whole_or_not_at_all(run, main, monkeypatch):
    """A link to the old ones still leads to them."""
    monkeypatch.chdir(run.folder)
    (run.folder / "out.json").write_text('{"mIoU": 1.0}')
    os.link("out.json", "old.json")
    main(evaluate, "--json", "out.json", "--workers", 0)
    assert json.loads((run.folder / "old.json").read_text()) == {"mIoU": 1.0}
    assert len(json.loads((run.folder / "out.json").read_text())["IoU"]) == 150
    assert not os.path.exists("out.json.part")


class Accelerator:
    """torch.accelerator of a machine with so many GPUs of this kind, or none."""

    def __init__(self, kind, count):
        self.kind = kind
        self.count = count

    def set_device_index(self, index):
        pass

    def current_accelerator(self, check_available):
        assert check_available  # torch that is built for GPUs also runs where there are none
        return torch.device(self.kind) if self.count else None


@pytest.mark.parametrize(
    "kind,count,rank,world,want",
    [
        ("cuda", 0, 0, 1, "cpu"),
        ("cuda", 1, 0, 1, "cuda:0"),
        ("cuda", 8, 5, 8, "cuda:5"),
        ("mps", 1, 0, 1, "mps:0"),
        ("mps", 1, 1, 2, "cpu"),
    ],
)
def test_each_process_has_the_gpu_that_torch_finds_for_it(
    kind, count, rank, world, want, monkeypatch
):
    monkeypatch.setattr(torch, "accelerator", Accelerator(kind, count))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert evaluate.choose_device(world) == torch.device(want)


@pytest.mark.parametrize(
    "kind,hardware,dtype,layout",
    [
        ("cuda", True, torch.bfloat16, torch.channels_last),
        ("cuda", False, torch.float32, torch.contiguous_format),
        ("mps", False, torch.float32, torch.contiguous_format),
        ("cpu", True, torch.bfloat16, torch.channels_last),
        ("cpu", False, torch.float32, torch.contiguous_format),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_has_it(kind, hardware, dtype, layout, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware)
    capability = (8, 0) if hardware else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=hardware))
    device = torch.device(kind)
    assert evaluate.choose_dtype("auto", device) == dtype
    assert evaluate.choose_dtype("float16", device) == torch.float16
    assert evaluate.memory_format(device, dtype) == layout
    assert kind == "mps" or evaluate.memory_format(device, torch.float16) == torch.channels_last
    assert evaluate.autocast(device, torch.float32).device == kind


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_convolutions_and_norms_of_a_training_step_see_the_layout_of_the_images(layout):
    torch.manual_seed(0)
    net = build_model("toy_p8", "ln_mln", 6).to(memory_format=layout).train()
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=layout)
    labels = torch.randint(0, 6, (2, 64, 96))
    seen = []

    def note(module, inputs, output):
        seen.extend([*inputs, output])

    for module in net.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Conv2d)):
            module.register_forward_hook(note)
    loss, _ = net(images, labels)
    loss.backward()

    assert len(seen) == 2 * (13 + 20)  # 4 more convolutions are computed without their modules
    assert all(x.is_contiguous(memory_format=layout) for x in seen)


@pytest.fixture
def small():
    """A model of six classes, and three pictures with labels of two classes, in memory."""
    torch.manual_seed(0)
    net = build_model("toy_p8", "none", 6)
    torch.nn.init.normal_(net.decode_head.classifier.weight)
    return net, ade20k.Classes(tuple("abcdef"), [[0, 0, 0]] * 6)


def test_evaluate_counts_every_picture_shows_it_and_leaves_the_model_as_it_was(small, run):
    net, classes = small
    pictures = run.folder / "set/images/validation"
    pairs = [(str(pictures / f"p{i}.jpg"), None) for i in range(5)]
    label = np.ones((40, 60), np.uint8)
    Image.fromarray(label).save(run.folder / "label.png")
    pairs[0] = (pairs[0][0], str(run.folder / "label.png"))
    how = dict(workers=0, short=32)
    seen = []

    def look(i, image, label, prediction):
        seen.append(i)
        assert not net.training
        path, _ = pairs[i]
        read = ade20k.load_image(path)
        assert (image == read).all()
        assert (label is None) == (i > 0)
        want = evaluate.predict(net, image, short=32)
        assert (prediction == want).all()

    net.train()
    matrix = evaluate.evaluate(net, pairs, classes, look=look, **how)
    assert net.training
    assert seen == [0, 1, 2, 3, 4]
    net.eval()
    image = ade20k.load_image(pairs[0][0])
    prediction = evaluate.predict(net, image, short=32)
    want = evaluate.confusion_matrix(label - 1, prediction, 6)  # the file holds class + 1
    assert (matrix == want).all()

    again = evaluate.evaluate(net, pairs[:1], classes, **how)
    assert not net.training
    assert (again == matrix).all()


def test_a_picture_that_cannot_be_used_ends_evaluate_or_goes_to_the_list_of_faults(small, run):
    net, classes = small
    pictures = run.folder / "set/images/validation"
    pairs = [(str(pictures / f"p{i}.jpg"), None) for i in range(3)]
    damaged, _ = pairs[1]
    with open(damaged, "r+b") as file:
        file.truncate(700)

    for workers in (0, 1):
        how = dict(workers=workers, short=32)
        with pytest.raises(ade20k.DataError, match="p1.jpg"):
            evaluate.evaluate(net, pairs, classes, **how)

        seen = []

        def look(i, image, label, prediction):
            seen.append(i)

        faults = []
        evaluate.evaluate(net, pairs, classes, look=look, faults=faults, **how)
        assert seen == [0, 2]
        (fault,) = faults
        assert fault.startswith(damaged)


LACKING = """
import enum, multiprocessing, signal, sys, ctypes, torch, torch.multiprocessing
import torch.utils.data._utils.signal_handling as handling
del signal.SIGUSR1, signal.SIGCHLD, signal.SIGHUP
there = {each.name: int(each) for each in signal.Signals if hasattr(signal, each.name)}
signal.Signals = enum.IntEnum("Signals", there)
handling.IS_WINDOWS = True  # torch itself then asks for none of it
library = ctypes.CDLL
def cdll(name, *more, **how):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return library(name, *more, **how)
ctypes.CDLL = cdll
sys.modules["fcntl"] = None
import model, upernet, ade20k, evaluate, train, convert_weights
assert [s.name for s in evaluate.SIGNALS] == ["SIGINT", "SIGTERM"]
if __name__ == "__main__":
    evaluate.main()
"""


@pytest.mark.parametrize(
    "lacking,workers",
    [
        (True, 0),
        (True, 1),
        (False, 1),
    ],
)
def test_without_what_a_platform_lacks_and_with_spawn_evaluation_works(lacking, workers, run):
    """Windows has no fork, fcntl, SIGUSR1, SIGCHLD, and no C library under the name None."""
    code = "import multiprocessing, sys\nsys.path.insert(0, sys.argv.pop(1))\n"
    code += "if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n"
    code += LACKING if lacking else "import evaluate\nif __name__ == '__main__': evaluate.main()"
    (run.folder / "a folder").mkdir()
    (run.folder / "a folder" / "program.py").write_text(code)
    arguments = ("--image", "set/images/validation/p0.jpg", "--show", "a folder/out")
    command = [sys.executable, "a folder/program.py", ROOT, *arguments, "--workers", str(workers)]
    done = subprocess.run(command, cwd=run.folder, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(run.folder / "a folder" / "out") == ["p0.png"]


def test_results_that_cannot_be_written_are_refused_before_the_first_picture(
    run, main, monkeypatch, capsys
):
    monkeypatch.chdir(run.folder)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **how: pytest.fail("it was evaluated"))
    (run.folder / "file").touch()
    for arguments in (
        ("--json", "set"),
        ("--json", "new/out.json"),
        ("--show", "file"),
    ):
        with pytest.raises(SystemExit) as end:
            main(evaluate, *arguments)
        assert end.value.code == 2
        assert arguments[1].split("/")[0] in capsys.readouterr().err

    for content in ("", '{"mIoU": 1.0}'):  # none yet, or older scores
        (run.folder / "out.json").write_text(content)
        with pytest.raises(pytest.fail.Exception):
            main(evaluate, "--json", "out.json")
        assert (run.folder / "out.json").read_text() == content


def test_no_output_replaces_what_was_read_or_another_output(run, main, monkeypatch, capsys):
    monkeypatch.chdir(run.folder)
    os.makedirs("own")
    picture = formulas.picture(40, 60)
    picture = Image.fromarray(picture)
    for name in ("x.png", "y.jpg"):
        picture.save(f"own/{name}")
    os.symlink("own", "link")
    os.link("runs/a/checkpoint_5.pt", "scores.json")
    os.symlink("/dev/null", "null.json")
    (run.folder / "notes.json").write_text("[1]")
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    absolute = str(run.folder / "own")
    truth = "set/annotations/validation"
    holds = "holds pictures, labels or other results"

    for arguments, words in (
        (("--image", "own", "--save-labels", "own"), f"own: {holds}"),
        (("--image", "own", "--show", absolute), f"own: {holds}"),
        (("--image", "own", "--show", "own/../own"), f"own: {holds}"),
        (("--image", "own", "--show", "link"), f"link: {holds}"),
        (("--image", "link/x.png", "--show", "own"), f"own: {holds}"),
        (("--save-labels", truth), f"{truth}: {holds}"),
        (("--image", "set/images/validation", "--save-labels", truth), f"{truth}: {holds}"),
        (("--save-labels", "new", "--show", "./new"), f"new: {holds}"),
        (("--json", f"{truth}/p1.png"), "p1.png: exists and holds no scores"),
        (("--json", "scores.json"), "scores.json: exists and holds no scores"),
        (("--json", "notes.json"), "notes.json: exists and holds no scores"),
        (("--json", "null.json"), "null.json: exists and holds no scores"),
    ):
        with pytest.raises(SystemExit) as end:
            main(evaluate, *arguments)
        assert end.value.code == 2
        assert words in capsys.readouterr().err

    picture.save("own/x.jpg")
    with pytest.raises(SystemExit) as end:
        main(evaluate, "--image", "own", "--show", "never")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "own: two pictures have one name" in error

    assert not os.path.exists("never")
    for path, content in before.items():
        assert path.read_bytes() == content


def test_two_and_three_processes_give_the_same_result_as_one(run):
    results = []
    for n in (1, 2, 3):
        launch = ()
        if n > 1:
            launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n))
        done = run("--json", f"{n}.json", launch=launch)

        assert done.returncode == 0, done.stderr
        with open(run.folder / f"{n}.json") as file:
            results.append(json.load(file))

    assert results[0] == results[1] == results[2]


def test_any_folder_of_pictures_is_labelled_without_truth(run):
    done = run("--image", "set/images/validation", "--show", "out")
    assert done.returncode == 0, done.stderr
    names = [f"p{i}.png" for i in range(5)]
    assert sorted(os.listdir(run.folder / "out")) == names
    assert Image.open(run.folder / "out/p0.png").width >= 60 + 8

    done = run("--image", "set/images/validation/p3.jpg", "--save-labels", "one")
    assert done.returncode == 0
    assert os.listdir(run.folder / "one") == ["p3.png"]


def test_checkpoints_are_those_directly_in_a_folder_by_number(tmp_path):
    folder = tmp_path / "my [1] runs*" / "a"
    os.makedirs(folder / "backup")
    names = ["checkpoint_7.pt", "checkpoint_30.pt", "checkpoint_200.pt"]
    others = ["checkpoint_x.pt", "checkpoint_5 (copy).pt", "best.pt", "backup/checkpoint_900.pt"]
    for k, name in enumerate(reversed(names + others)):
        path = folder / name
        path.touch()
        os.utime(path, (k, k))

    paths = [str(folder / name) for name in names]
    assert evaluate.checkpoints(str(folder)) == paths
    assert evaluate.checkpoints(str(tmp_path)) == []
    assert evaluate.checkpoints(str(tmp_path / "absent")) == []


def test_the_newest_run_is_the_one_whose_log_was_written_last(tmp_path):
    root = tmp_path / "my [1] runs*"
    for k, name in enumerate(("a", "b", "empty", "a/deep")):
        os.makedirs(root / name)
        log = root / name / "log.jsonl"
        log.touch()
        os.utime(log, (k, k))
        if name != "empty":
            checkpoint = root / name / "checkpoint_7.pt"
            checkpoint.touch()

    newest = evaluate.newest_run(str(root))
    assert newest == str(root / "b")

    log = root / "a" / "log.jsonl"
    os.utime(log, (9, 9))
    newest = evaluate.newest_run(str(root))
    assert newest == str(root / "a")
    with pytest.raises(evaluate.UsageError, match="no run with a checkpoint in it"):
        evaluate.newest_run(str(tmp_path))


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_files_of_a_folder_are_named_at_the_end_and_the_others_labelled(processes, run):
    folder = run.folder / "set/images/validation"
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").write_text("no picture")
    (folder / "below").mkdir()
    Image.fromarray(formulas.picture(40, 60)).save(folder / "z.WEBP", format="webp")
    with open(folder / "p2.jpg", "r+b") as file:
        file.truncate(700)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ("--image", "set/images/validation", "--save-labels", "out")
    done = run(*arguments, launch=launch if processes > 1 else ())

    assert done.returncode == 1, done.stderr
    names = [f"{name}.png" for name in ("p0", "p1", "p3", "p4", "z")]
    assert sorted(os.listdir(run.folder / "out")) == names

    for name in ("notes.txt", "p2.jpg"):
        path = os.path.join("set/images/validation", name)
        assert done.stderr.count(f"not labelled: {path}: ") == 1

    assert "hidden" not in done.stderr
    assert "below" not in done.stderr
    assert processes > 1 or "Traceback" not in done.stderr


@pytest.mark.parametrize("named", ["none.jpg", "empty"])
def test_a_single_picture_that_is_not_there_is_named_too(named, run, main, monkeypatch, capsys):
    monkeypatch.chdir(run.folder)
    os.makedirs("empty")
    with pytest.raises(SystemExit) as end:
        main(evaluate, "--image", named, "--save-labels", "out", "--workers", 0)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(f"not labelled: {named}: ")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--image", "set"), "needs --show"),
        (("--scales", "0.5,big"), "--scales: invalid list_of_scales value: '0.5,big'"),
        (("--scales", "-1"), "--scales: -1 is not a number from 0.01 to 100"),
        (("--scales", "0.5,...,1e9"), "--scales: 1e9 is not a number from 0.01 to 100"),
        (("--scales", "1,inf"), "--scales: inf is not a number from 0.01 to 100"),
        (("--scales", "1,nan"), "--scales: nan is not a number from 0.01 to 100"),
        (("--scales", "0,...,1"), "--scales: 0 is not a number from 0.01 to 100"),
        (("--scales", "1,2,...,3"), "--scales: invalid list_of_scales value: '1,2,...,3'"),
        (("--opacity", "nan"), "--opacity: nan is not a number from 0 to 1"),
        (("--short-side", "-5"), "--short-side: -5 is not a number from 1 to 1e+18"),
        (("--short-side", "0"), "--short-side: 0 is not a number from 1 to 1e+18"),
        (("--workers", "-1"), "--workers: -1 is not a number from 0 to 1e+18"),
        (("--workers", "two"), "--workers: invalid number value: 'two'"),
        (("--slide", "0", "--stride", "1"), "--slide needs a --stride"),
        (("--slide", "64"), "--slide needs a --stride"),
        (("--stride", "64"), "--slide needs a --stride"),
        (("--slide", "64", "--stride", "65"), "as many pixels or fewer"),
        (("--checkpoint", "none.pt"), "error: none.pt: "),
        (("--data", "nowhere"), "error: nowhere"),
        (("--checkpoint", "set/images/validation/p0.jpg"), "p0.jpg: "),
    ],
)
def test_wrong_inputs_end_with_one_sentence(run, main, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(run.folder)
    with pytest.raises(SystemExit) as end:
        main(evaluate, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_stray_variable_of_torchrun_ends_with_one_sentence(
    name, run, main, monkeypatch, capsys
):
    monkeypatch.chdir(run.folder)
    monkeypatch.setenv(name, "4")
    with pytest.raises(SystemExit) as end:
        main(evaluate)

    assert end.value.code == 2
    assert "start with torchrun, or unset RANK and WORLD_SIZE: " in capsys.readouterr().err


def test_of_a_run_its_best_is_taken_or_the_newest_and_of_a_folder_of_runs_the_newest(
    run, main, monkeypatch, capsys
):
    monkeypatch.chdir(run.folder)
    for name in ("a/checkpoint_10.pt", "b/checkpoint_5.pt", "b/best.pt"):
        os.makedirs(os.path.dirname(f"runs/{name}"), exist_ok=True)
        shutil.copy("runs/a/checkpoint_5.pt", f"runs/{name}")
    os.utime("runs/a/checkpoint_5.pt", (3e9, 3e9))  # by number, not by time
    (run.folder / "runs/b/log.jsonl").touch()
    os.utime("runs/a/log.jsonl", (1e9, 1e9))

    best = os.path.join("runs", "b", "best.pt")
    newest = os.path.join("runs", "a", "checkpoint_10.pt")
    cases = [
        ("runs", best),
        ("runs/a", newest),
        ("runs/b", best),
        (best, best),
    ]
    for named, want in cases:
        main(evaluate, "--checkpoint", named, "--workers", 0)
        printed = capsys.readouterr().out
        assert f"{want}: kind ours" in printed


PLAIN = ("a", "b", "c", "d", "e", "f")


@pytest.mark.parametrize(
    "key,value",
    [
        ("classes", 5),
        ("classes", ["a", "b"]),
        ("classes", {"names": PLAIN}),
        ("classes", (PLAIN, [[0, 0, 0]] * 5, False)),
        ("classes", (PLAIN, [[0, 0, 256]] * 6, False)),
        ("classes", (PLAIN, None, False)),
        ("args", {"arch": "resnet50"}),
        ("args", ["toy_p8"]),
        ("meta", {"CLASSES": torch.zeros(6), "PALETTE": 5}),
        ("meta", "deit"),
    ],
)
def test_pictures_are_labelled_whatever_a_file_says_besides_its_weights(
    key, value, run, main, small, monkeypatch
):
    """Colours and names are then those of no data set."""
    monkeypatch.chdir(run.folder)
    torch.save({"model": small[0].state_dict(), key: value}, "odd.pt")
    arguments = ("--image", "set/images/validation/p0.jpg", "--show", "out", "--short-side", 32)
    main(evaluate, "--checkpoint", "odd.pt", *arguments, "--workers", 0)
    assert os.listdir("out") == ["p0.png"]


def test_an_architecture_that_a_file_claims_and_its_weights_are_not_is_refused(
    run, main, small, monkeypatch, capsys
):
    monkeypatch.chdir(run.folder)
    net, _ = small
    torch.save({"model": net.state_dict(), "args": {"arch": "deit_t16"}}, "claims.pt")
    with pytest.raises(SystemExit) as end:
        main(evaluate, "--checkpoint", "claims.pt")
    assert end.value.code == 2
    assert "error: claims.pt: " in capsys.readouterr().err


def test_more_classes_than_labels_can_hold_are_refused(run, main, monkeypatch, capsys):
    monkeypatch.chdir(run.folder)
    for n, words in ((255, "knows 255 classes ('0'"), (256, "labels of 8 bits hold 255")):
        net = build_model("toy_p8", "none", n)
        torch.save(net.state_dict(), "many.pt")
        with pytest.raises(SystemExit) as end:
            main(evaluate, "--checkpoint", "many.pt")
        assert end.value.code == 2
        assert words in capsys.readouterr().err


def test_of_a_folder_only_files_are_labelled(run, main, monkeypatch):
    monkeypatch.chdir(run.folder)
    os.makedirs("own/below")
    os.symlink("loop.jpg", "own/loop.jpg")
    os.mkfifo("own/pipe.jpg")  # to open one waits until somebody writes to it
    for name in (".hidden.jpg", "good.jpg"):
        picture = formulas.picture(40, 60)
        picture = Image.fromarray(picture)
        picture.save(f"own/{name}")
    main(evaluate, "--image", "own", "--save-labels", "labels", "--workers", 0)
    assert os.listdir("labels") == ["good.png"]


def test_pictures_in_folders_below_are_labelled_and_their_results_keep_the_folders(
    run, main, monkeypatch
):
    monkeypatch.chdir(run.folder)
    for name in ("cities/a/x.jpg", "cities/b/c/x.jpg", "cities/.hidden/x.jpg"):
        Path(name).parent.mkdir(parents=True)
        Image.fromarray(formulas.picture(40, 60)).save(name)
    main(evaluate, "--image", "cities", "--save-labels", "labels", "--workers", 0)
    found = sorted(path.as_posix() for path in Path("labels").rglob("*.png"))
    assert found == ["labels/a/x.png", "labels/b/c/x.png"]


def test_a_file_without_auxiliary_head_gets_one_that_can_be_trained(tmp_path):
    weights = build_model("toy_p8", "ln").state_dict()
    weights = {k: v for k, v in weights.items() if not k.startswith("auxiliary_head.")}
    path = str(tmp_path / "model.pt")
    torch.save(weights, path)

    torch.manual_seed(3)
    want = build_model("toy_p8", "ln").auxiliary_head.state_dict()
    torch.manual_seed(3)
    net, _ = evaluate.load_model(path)
    got = net.auxiliary_head.state_dict()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


BLOCKED = """
import evaluate, numpy, time
from torch.utils.data import DataLoader
pictures = [(0, numpy.zeros((3000, 3000), numpy.uint8))] * 9
how = dict(batch_size=None, collate_fn=tuple, num_workers=2, worker_init_fn=evaluate.start_worker)
loader = iter(DataLoader(pictures, **how))
next(loader)
print("the loaders have the next pictures, which nothing takes", flush=True)
time.sleep(100)
"""


def test_loaders_that_are_blocked_handing_over_end_with_a_killed_program():
    """torch looks for its main process only between two pictures."""
    command = [sys.executable, "-c", BLOCKED]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    run.stdout.readline()
    time.sleep(2)
    run.kill()
    run.communicate(timeout=60)  # the loaders hold the output open


def test_damage_met_on_the_way_is_named_too(run):
    with open(run.folder / "set/images/validation/p2.jpg", "r+b") as file:
        file.truncate(700)  # the header is whole, the picture is not
    done = run()
    assert done.returncode == 2
    assert "p2.jpg: " in done.stderr
    assert "Traceback" not in done.stderr


def test_sheet_shows_the_picture_at_its_own_size_and_again_below_colours_of_the_opacity():
    image = formulas.picture(200, 333)
    label = formulas.labels(200, 333)[0].astype(np.uint8)
    classes = ade20k.Classes()
    drawn = evaluate.sheet([(image, None, label)], classes, 0.25)
    canvas = np.asarray(drawn).astype(float)
    rows = slice(28 + 4, 28 + 4 + 200)  # below the caption
    assert (canvas[rows, 4 : 4 + 333] == image).all()
    got = canvas[rows, 341 + 4 : 341 + 4 + 333]
    palette = np.array(classes.palette + [[0, 0, 0]] * 106)

    want = 0.75 * image + 0.25 * palette[label]
    error = np.abs(got - want)
    assert error.max() <= 1


def test_curves_draw_every_value_where_the_axes_say():
    entries = [dict(iteration=0, args={})]
    entries += [dict(iteration=i, loss=5.0 - i / 25, lr=1e-4) for i in range(10, 101, 10)]
    entries += [
        dict(iteration=50, mIoU=20.0),
        dict(iteration=100, mIoU=40.0),
        dict(iteration=100, mIoU=None),
    ]
    canvas = np.asarray(evaluate.curves(entries)).astype(int)

    assert canvas.shape[1] == 800
    distance = np.abs(canvas - (220, 20, 60)).sum(2)  # crimson is the mIoU
    red = np.argwhere(distance < 30)
    red = red[red[:, 0] > 25]  # below the title; iterations from 0 to 800, values from 400 to 30
    left = red[red[:, 1].argmin()]
    right = red[red[:, 1].argmax()]

    assert abs(left[1] - 800 * 0.5) <= 4
    assert abs(right[1] - 800) <= 4
    assert abs(left[0] - (400 - 370 * 0.5)) <= 4
    assert abs(right[0] - 30) <= 4


@pytest.mark.parametrize(
    "height,width",
    [
        (1, 1),
        (1, 10000),
        (10000, 1),
        (2600, 2),
        (7, 300),
    ],
)
def test_any_strip_is_labelled_and_drawn(height, width, small):
    net, classes = small
    image = np.full((height, width, 3), 99, np.uint8)
    label = evaluate.predict(net.eval(), image, short=32)
    assert label.shape == (height, width)

    for truth, panels in ((label, 3), (None, 2)):
        drawn = evaluate.sheet([(image, truth, label)], classes)
        side = min(width, 2000)
        assert side / 2 < drawn.width / panels < side + 300
        assert height * side / width / 2 < drawn.height < height + 260


def test_sheet_has_room_for_every_name_and_colour():
    image = formulas.picture(40, 60)
    label = np.arange(40 * 60).reshape(40, 60) % 30
    label = label.astype(np.uint8)
    picture = evaluate.sheet([(image, label, label)], ade20k.Classes())
    colours = {colour for count, colour in picture.getcolors(1 << 20)}
    for colour in ade20k.PALETTE[:30].tolist():
        assert tuple(colour) in colours
