"""train.py: schedules and optimizers against the real reference, batch arithmetic, logs, resume, and whole small runs."""
import json
import os
import shutil
import subprocess
import sys

import formulas
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_set, write_mmseg

import train
from convert_weights import MMSEG, rename
from evaluate import UsageError
from upernet import build_model


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_learning_rates_equal_the_reference(name, golden):
    ours = [train.learning_rate(i, 160000, **train.OPTIMIZERS[name]) for i in (0, 1, 749, 1499, 1500, 80000, 159999)]
    np.testing.assert_allclose(ours, golden("optimizers")[f"{name}_lr"], rtol=1e-12)


@pytest.mark.parametrize("name,tolerance", [("sgd", 1e-5), ("adamw", 1e-4)])
def test_four_steps_give_the_references_weights(name, tolerance, golden, filled):
    gold, net = golden("optimizers"), filled("small", "mln").train()
    optimizer = train.build_optimizer(net, name, train.OPTIMIZERS[name]["lr"])
    images, labels = torch.from_numpy(formulas.image(97, 131, 4)), torch.from_numpy(formulas.labels(97, 131, 4))
    for i in range(1500, 1504):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(i, 160000, **train.OPTIMIZERS[name])
        optimizer.zero_grad()
        net(images, labels)[0].backward()
        optimizer.step()
    theirs, compared = {ours: name for name, ours in MMSEG.items()}, 0
    ours = {rename(k, theirs): p.detach().numpy() for k, p in net.named_parameters()}
    assert set(ours) == set(gold["names"])
    for key, weights, moved in zip(gold["names"], gold[f"{name}_weights"], gold[f"{name}_moved"]):
        got = formulas.samples(ours[key], weights.shape[0])
        if key.endswith("in_proj_bias"):        # the key bias: softmax does not see it, its exact gradient is 0
            width = formulas.SMALL["width"]
            third = np.linspace(0, 3 * width - 1, len(got)).astype(int) // width
            got, weights = got[third != 1], weights[third != 1]
        if key.startswith("neck.convs") and key.endswith("bias"):
            continue                            # in front of a BatchNorm: exact gradient 0 as well
        assert moved > 0
        assert np.abs(got - weights).max() <= tolerance * max(1e-3, np.abs(weights).max()), key
        compared += 1
    assert compared > 100


def test_only_cls_token_and_pos_embed_have_no_weight_decay():
    net = build_model("toy_p8", "ln_mln")
    names = {id(p): n for n, p in net.named_parameters()}
    groups = train.build_optimizer(net, "adamw", 1e-3).param_groups
    free = [names[id(p)] for g in groups for p in g["params"] if g["weight_decay"] == 0]
    assert sorted(free) == ["backbone.cls_token", "backbone.pos_embed"]
    assert sum(len(g["params"]) for g in groups) == len(names)


@pytest.mark.parametrize("batch,world,micro,sync,want", [
    (16, 1, None, False, (16, 1)), (16, 8, None, True, (2, 1)), (16, 2, 2, False, (2, 4)), (16, 16, None, True, (1, 1))])
def test_batch_is_processes_times_micro_times_steps(batch, world, micro, sync, want):
    assert train.split_batch(batch, world, micro, sync) == want and world * want[0] * want[1] == batch


@pytest.mark.parametrize("batch,world,micro,message", [
    (16, 3, None, r"shared by 3 processes, \[1, 2, 4, 8, 16\] could"), (16, 2, 3, r"does not divide the 8 .* \[2, 4, 8\]"),
    (16, 16, None, "single value to normalise"), (1, 1, None, "single value"), (16, 1, 1, r"\[2, 4, 8, 16\]")])
def test_batches_that_cannot_be_are_refused_with_numbers_that_can(batch, world, micro, message):
    with pytest.raises(UsageError, match=message):
        train.split_batch(batch, world, micro, sync_bn=False)


def test_accumulated_gradients_equal_the_whole_batchs():
    torch.manual_seed(0)
    net = build_model("toy_p8", "none", 6).double().eval()          # eval: BatchNorm and dropout frozen
    images, labels = torch.randn(4, 3, 48, 64).double(), torch.randint(0, 6, (4, 48, 64))
    net(images, labels)[0].backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for x, y in zip(images.split(2), labels.split(2)):
        (net(x, y)[0] / 2).backward()
    for p, want in zip(net.parameters(), whole):
        torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-12)


# ---- whole runs ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set of eight training and five validation scenes of the toy kind in it."""
    folder = tmp_path_factory.mktemp("train")
    draw_set(folder / "set", 8, 5)
    return folder


def run(folder, *arguments, launch=()):
    return subprocess.run([sys.executable, *launch, os.path.join(ROOT, "train.py"), *map(str, arguments)], cwd=folder,
                          capture_output=True, text=True)


TINY = ("--data", "set", "--arch", "toy_p8", "--pretrained", "none", "--lr", 1e-3, "--iters", 6, "--interval", 3,
        "--batch-size", 4, "--crop-size", 32, "--short-side", 32)


def read_log(folder):
    with open(folder / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def straight(folder):
    """A run that nothing disturbed."""
    done = run(folder, *TINY, "--work-dir", "runs/straight")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "straight", done


def test_run_leaves_checkpoints_log_and_picture(straight):
    work, done = straight
    assert {"checkpoint_3.pt", "checkpoint_6.pt", "log.jsonl", "sheet_6.png"} <= set(os.listdir(work))
    assert done.stdout.strip().endswith("runs/straight/sheet_6.png") and "batch 4 = 1 processes x 4" in done.stdout
    log = read_log(work)
    steps = [e for e in log if "loss" in e]
    assert steps and steps[-1]["iteration"] == 6
    assert steps[-1]["loss"] == pytest.approx(steps[-1]["decode"] + steps[-1]["aux"], rel=1e-5)
    assert {"lr", "seconds", "data_seconds", "images_per_second"} <= set(steps[-1])
    assert [e["iteration"] for e in log if "mIoU" in e] == [3, 6]
    content = torch.load(work / "checkpoint_6.pt", weights_only=True)
    assert {"model", "optimizer", "scaler", "iteration", "seed", "args"} <= set(content)
    assert content["iteration"] == 6 and content["args"]["arch"] == "toy_p8"


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_ends_with_the_same_weights_and_log(straight, folder, workers):
    work = folder / "runs" / f"resumed{workers}"
    os.makedirs(work)
    for name in ("checkpoint_3.pt", "log.jsonl"):
        (work / name).write_bytes((straight[0] / name).read_bytes())
    done = run(folder, "--resume", "--work-dir", work, "--workers", workers)
    assert done.returncode == 0, done.stderr
    want, got = weights(straight[0] / "checkpoint_6.pt"), weights(work / "checkpoint_6.pt")
    assert all(torch.equal(got[k], v) for k, v in want.items())
    keys = ("iteration", "mIoU")
    pick = lambda log: [tuple(e.get(k) for k in keys) for e in log if "mIoU" in e]      # noqa: E731
    assert pick(read_log(work)) == pick(read_log(straight[0]))


def test_architecture_of_the_checkpoint_wins_on_resume(straight, folder):
    done = run(folder, "--resume", "--work-dir", straight[0], "--arch", "deit_t16")
    assert "--arch deit_t16 is ignored" in done.stderr
    assert done.returncode == 2 and "nothing is left to train" in done.stderr


def test_pretrained_file_is_used(folder):
    torch.manual_seed(5)
    net = build_model("toy_p8")
    backbone = {k: v for k, v in net.state_dict().items() if k.startswith("backbone.")}
    path = write_mmseg(backbone, folder / "backbone.pth")
    done = run(folder, *TINY, "--iters", 1, "--lr", 0, "--warmup", 0, "--pretrained", path, "--work-dir", "runs/pretrained")
    assert done.returncode == 0, done.stderr
    assert "mmsegmentation" in done.stdout
    after = weights(folder / "runs/pretrained/checkpoint_1.pt")["backbone.pos_embed"]
    np.testing.assert_array_equal(after, formulas.weight("backbone.pos_embed", tuple(after.shape)))


@pytest.mark.parametrize("arguments,message", [
    (("--data", "nowhere"), "nowhere/images/training: no such folder; `python ade20k.py download data/ade`"),
    (("--data", "set", "--arch", "toy_p8"), "no pretrained file for toy_p8"),
    (("--data", "set", "--pretrained", "absent.pth"), "absent.pth: no such file"),
    (("--data", "set", "--arch", "resnet50"), "invalid choice"),
    (("--data", "set", "--crop-size", "0"), "'0' is not a whole number above 0"),
    (("--data", "set", "--batch-size", "1"), "single value to normalise"),
    (("--resume", "--work-dir", "nothing"), "nothing: no checkpoint_"),
    ((*TINY, "--work-dir", "set/images/training/s0.jpg/x"), "Not a directory: 'set/images/training/s0.jpg/x'"),
    ((*TINY, "--arch", "deit_t16", "--pretrained", "toy.pt"), "does not fit (another architecture?)"),
])
def test_wrong_inputs_end_with_one_sentence(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    torch.save({"model": build_model("toy_p8").state_dict()}, "toy.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_damaged_training_data_is_named(folder):
    shutil.copytree(folder / "set", folder / "broken")
    for i in range(8):
        with open(folder / f"broken/images/training/s{i}.jpg", "r+b") as file:
            file.truncate(900)                  # the header is whole, the picture is not
    done = run(folder, *TINY, "--data", "broken")
    assert done.returncode == 2 and "cannot be read as a picture" in done.stderr and "Traceback" not in done.stderr


def test_toy_has_defaults_of_its_own_and_what_is_given_wins():
    args, _ = train.parse(["--data", "toy", "--iters", "9"])
    assert (args.arch, args.pretrained, args.iters, args.crop_size) == ("toy_p8", "none", 9, train.TOY["crop_size"])


def test_plain_defaults_are_the_published_recipe(golden):
    args, _ = train.parse([])
    assert (args.arch, args.iters, args.interval, args.batch_size, args.crop_size) == ("deit_s16", 160000, 16000, 16, 512)
    assert (args.lr, args.warmup, args.optimizer, args.pretrained) == (6e-5, 1500, "adamw", "auto")
    assert args.data == "data/ade/ADEChallengeData2016"
