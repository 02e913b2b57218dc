"""train.py: schedules and optimizers against the real reference, batch arithmetic, logs, resume,
and whole small runs."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import formulas
import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InvalidCxxCompiler
from conftest import ROOT, Watch, assert_equal, draw_set, write_mmseg

import evaluate
import train
from ade20k import Classes, DataError
from convert_weights import MMSEG, rename
from evaluate import UsageError
from upernet import build_model


def schedule_of(name):
    """The arguments of learning_rate."""
    return {k: v for k, v in train.OPTIMIZERS[name].items() if k != "weight_decay"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_learning_rates_equal_the_reference(name, golden):
    ours = [
        train.learning_rate(i, 160000, **schedule_of(name))
        for i in (0, 1, 749, 1499, 1500, 80000, 159999)
    ]
    theirs = golden("optimizers")[f"{name}_lr"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("name,tolerance", [("sgd", 1e-5), ("adamw", 1e-4)])
def test_four_steps_give_the_references_weights(name, tolerance, golden, filled):
    gold = golden("optimizers")
    net = filled("small", "mln").double().train()
    schedule = schedule_of(name)
    decay = train.OPTIMIZERS[name]["weight_decay"]
    optimizer = train.build_optimizer(net, name, schedule["lr"], decay)
    images = torch.from_numpy(formulas.image(97, 131, 4))
    images = images.double()
    labels = torch.from_numpy(formulas.labels(97, 131, 4))

    for i in range(1500, 1504):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(i, 160000, **schedule)
        optimizer.zero_grad()
        loss, _ = net(images, labels)
        loss.backward()
        optimizer.step()

    theirs = {ours: name for name, ours in MMSEG.items()}
    ours = {}
    for key, parameter in net.named_parameters():
        ours[rename(key, theirs)] = parameter.detach().numpy()
    assert set(ours) == set(gold["names"])

    compared = 0
    all_weights = gold[f"{name}_weights"]
    all_moved = gold[f"{name}_moved"]
    for key, weights, moved in zip(gold["names"], all_weights, all_moved):
        got = formulas.samples(ours[key], len(weights))
        if key.endswith("in_proj_bias"):  # of the keys: softmax does not see it, gradient 0
            width = formulas.SMALL["width"]
            positions = np.linspace(0, 3 * width - 1, len(got))
            part = positions.astype(int) // width  # 0 queries, 1 keys, 2 values
            others = part != 1
            got = got[others]
            weights = weights[others]
        if key.startswith("neck.convs") and key.endswith("bias"):
            continue  # in front of a BatchNorm: exact gradient 0 as well

        assert moved > 0
        error = np.abs(got - weights).max()
        largest = np.abs(weights).max()
        assert error <= tolerance * max(1e-3, largest), key
        compared += 1
    assert compared > 100


TOKENS = ("backbone.cls_token", "backbone.pos_embed")


def names_by_id(net):
    """{id of a parameter: its name}"""
    return {id(parameter): name for name, parameter in net.named_parameters()}


def test_only_cls_token_and_pos_embed_have_no_weight_decay():
    net = build_model("toy_p8", "ln_mln")
    names = names_by_id(net)
    groups = train.build_optimizer(net, "adamw", 1e-3).param_groups

    free = []
    count = 0
    for group in groups:
        members = [names[id(p)] for p in group["params"]]
        count += len(members)
        if group["weight_decay"] == 0:
            free += members
    assert sorted(free) == list(TOKENS)
    assert count == len(names)


def test_layer_decay_gives_layer_k_its_power_of_it():
    """Against BEiT's get_num_layer_for_vit and LayerDecayValueAssigner, written down again."""

    def beits_scale(name, layers, decay):
        last = layers + 1
        values = [decay ** (last - i) for i in range(last + 1)]
        if name in TOKENS:
            return values[0]
        if name.startswith("backbone.patch_embed"):
            return values[0]
        if name.startswith("backbone.blocks"):
            block = name.split(".")[2]
            return values[int(block) + 1]
        return values[last]

    net = build_model("toy_p8", "ln_mln", 6)
    optimizer = train.build_optimizer(net, "adamw", 1e-3, 0.05, 0.65)
    names = names_by_id(net)
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = group
    assert set(found) == set(names.values())

    for name, group in found.items():
        assert group["scale"] == beits_scale(name, 4, 0.65), name
        exempt = name in TOKENS or name.endswith(".bias") or "norm" in name or ".bn." in name
        assert group["weight_decay"] == (0 if exempt else 0.05), name

    assert found["decode_head.classifier.weight"]["scale"] == 1
    assert found["backbone.norm.weight"]["scale"] == 1
    assert found["backbone.pos_embed"]["scale"] == 0.65**5


@pytest.mark.parametrize("name,sizes", [("adamw", 2), ("sgd", 1)])
def test_without_layer_decay_the_groups_are_those_of_old_checkpoints(name, sizes):
    """Their optimizer's state is read by position."""
    net = build_model("toy_p8", "ln_mln")
    tokens = []
    others = []
    for key, weight in net.named_parameters():
        exempt = name == "adamw" and key in TOKENS
        members = tokens if exempt else others
        members.append(id(weight))
    expected = [members for members in (others, tokens) if members]

    groups = train.build_optimizer(net, name, 1e-3).param_groups
    found = []
    for group in groups:
        assert group["scale"] == 1
        found.append([id(p) for p in group["params"]])
    assert found == expected
    assert len(found) == sizes


@pytest.mark.parametrize(
    "batch,world,micro,want",
    [
        (16, 1, None, (16, 1)),
        (16, 8, None, (2, 1)),
        (16, 2, 2, (2, 4)),
        (16, 16, None, (1, 1)),
    ],
)
def test_batch_is_processes_times_micro_times_steps(batch, world, micro, want):
    assert train.split_batch(batch, world, micro) == want
    size, steps = want
    assert world * size * steps == batch


@pytest.mark.parametrize(
    "batch,world,micro,message",
    [
        (16, 3, None, "16 pictures is not 3 processes x 5 pictures x a whole number"),
        (2, 3, None, "2 pictures is not 3 processes x 0 pictures x a whole number"),
        (16, 2, 3, "16 pictures is not 2 processes x 3 pictures x a whole number"),
        (1, 1, None, "single value to normalise"),
        (16, 1, 1, "single value"),
    ],
)
def test_batches_that_cannot_be_are_refused(batch, world, micro, message):
    with pytest.raises(UsageError, match=message):
        train.split_batch(batch, world, micro)


def test_accumulated_gradients_equal_the_whole_batchs():
    torch.manual_seed(0)
    net = build_model("toy_p8", "none", 6).double().eval()  # eval: BatchNorm and dropout frozen
    images = torch.randn(4, 3, 48, 64).double()
    labels = torch.randint(0, 6, (4, 48, 64))

    loss, _ = net(images, labels)
    loss.backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()

    for half in (slice(0, 2), slice(2, 4)):
        loss, _ = net(images[half], labels[half])
        (loss / 2).backward()

    for p, want in zip(net.parameters(), whole):
        torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-12)


def test_bfloat16_changes_a_step_and_the_labels_by_its_rounding_alone():
    """2^-9 of each product: gradients point the same way, the loss is float32, few labels change
    even without training."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    net = build_model("toy_p8", "ln_mln", 6)
    net.decode_head.dropout.p = 0.0
    net.auxiliary_head.dropout.p = 0.0

    small = formulas.picture(64, 96).transpose(2, 0, 1)  # (3, 64, 96)
    four = small[None].repeat(4, 0)
    images = torch.from_numpy(four)
    truth = torch.randint(0, 6, (4, 64, 96))
    large = formulas.picture(200, 300)
    found = {}

    for dtype in (torch.float32, torch.bfloat16):
        evaluate.prepare(net, device, dtype, False).zero_grad()
        layout = evaluate.memory_format(device, dtype)
        x = train.normalise(images).contiguous(memory_format=layout)
        with evaluate.autocast(device, dtype):
            loss, _ = net(x, truth)
        loss.backward()
        assert loss.dtype == torch.float32

        net.eval()
        labels = evaluate.predict(net, large, (1, 1.5), True, 96, dtype)
        net.train()
        gradients = [p.grad.flatten() for p in net.parameters()]
        found[dtype] = loss, torch.cat(gradients), labels

    loss, grad, labels = found[torch.float32]
    loss16, grad16, labels16 = found[torch.bfloat16]
    assert not torch.equal(grad, grad16)
    cosine = torch.cosine_similarity(grad, grad16, dim=0)
    assert cosine > 0.98
    torch.testing.assert_close(loss16, loss, rtol=1e-2, atol=0)
    same = labels == labels16
    assert same.mean() > 0.95


@pytest.mark.parametrize(
    "arch,drop_path,freeze,rate",
    [
        ("deit_t16", None, False, 0.1),
        ("deit_t16", 0.3, False, 0.3),
        ("deit_t16", None, True, 0),
        ("toy_p8", 0.3, True, 0.3),
    ],
)
def test_drop_path_is_the_last_layers_rate_and_freezing_needs_none(arch, drop_path, freeze, rate):
    with torch.device("meta"):
        net = build_model(arch)
    train.adapt(net, drop_path, freeze)

    assert net.backbone.drop_path == rate
    trained = {p.requires_grad for p in net.backbone.parameters()}
    assert trained == {not freeze}
    trained = {p.requires_grad for p in net.decode_head.parameters()}
    assert trained == {True}


def saved_numbers(net, images, labels):
    """-> how many numbers autograd keeps of a forward pass, and the loss."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = net(images, labels)
    return sum(sizes), loss


def test_a_frozen_backbone_keeps_no_activations():
    """What autograd saves on the way forward is what training needs memory for."""
    net = build_model("toy_p8", "mln", 6)
    images = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 6, (2, 64, 64))
    whole, _ = saved_numbers(net, images, labels)

    train.adapt(net, None, True)
    for features in net.backbone(images):
        assert not features.requires_grad
    frozen, loss = saved_numbers(net, images, labels)
    assert frozen < 0.8 * whole

    loss.backward()
    for parameter in net.backbone.parameters():
        assert parameter.grad is None
    for parameter in net.neck.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("kind,pinned", [("cuda", True), ("mps", False), ("cpu", False)])
def test_memory_is_only_pinned_for_cuda(kind, pinned, monkeypatch, folder):
    class Built(Exception):
        pass

    def loader(samples, **how):
        assert how["pin_memory"] is pinned
        raise Built

    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "setup_processes", lambda timeout: (0, 1, torch.device(kind)))
    monkeypatch.setattr(train, "DataLoader", loader)
    with pytest.raises(Built):
        train.train(*parse(*TINY))


# ---- whole runs ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set of eight training and five validation scenes of the toy kind in
    it."""
    folder = tmp_path_factory.mktemp("train")
    draw_set(folder / "set", 8, 5)
    return folder


SCRIPT = os.path.join(ROOT, "train.py")


def command(*arguments, launch=()):
    return [sys.executable, *launch, SCRIPT, *map(str, arguments)]


def run(folder, *arguments, launch=(), code=0):
    """train.py, which is to end with this code."""
    done = subprocess.run(
        command(*arguments, launch=launch), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


def parse(*arguments):
    return train.parse([*map(str, arguments)])


TINY = (
    *("--data", "set", "--arch", "toy_p8", "--pretrained", "none", "--lr", 1e-3),
    *("--iters", 6, "--interval", 3, "--batch-size", 4, "--crop-size", 32, "--short-side", 32),
)
TWO_STEPS = ("--iters", 2, "--interval", 2)
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def read_log(folder):
    with open(folder / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def validations(folder):
    """[(iteration, mIoU)] of a run's log."""
    found = []
    for entry in read_log(folder):
        if "mIoU" in entry:
            found.append((entry["iteration"], entry["mIoU"]))
    return found


def content_of(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return content_of(path)["model"]


def assert_ends_alike(work, other):
    """Two runs of six iterations end with the same weights."""
    got = weights(work / "checkpoint_6.pt")
    want = weights(other / "checkpoint_6.pt")
    assert_equal(got, want)


@pytest.fixture(scope="module")
def compiled(folder, tmp_path_factory):
    """A run with --compile in the background of the tests between `straight` and the one that waits
    for it: the C++ compiler is busy for a minute, on one core. -> (the process, its work
    directory)"""
    work = tmp_path_factory.mktemp("compiled")
    with subprocess.Popen(
        command(*TINY, *TWO_STEPS, "--compile", "--work-dir", work),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process, work
        process.kill()


@pytest.fixture(scope="module")
def straight(folder, compiled):
    """A run that nothing disturbed."""
    done = run(folder, *TINY, "--work-dir", "runs/straight")
    return folder / "runs" / "straight", done


def test_run_leaves_checkpoints_log_and_picture(straight):
    work, done = straight
    pictures = {"sheet_3.png", "sheet_6.png", "curves.png"}
    files = {"checkpoint_3.pt", "checkpoint_6.pt", "best.pt", "log.jsonl"}
    assert set(os.listdir(work)) == files | pictures
    assert Image.open(work / "curves.png").width > 700
    *_, validation, last = done.stdout.splitlines()
    assert validation.startswith("6/6  validation: mIoU")
    assert validation.endswith("runs/straight/sheet_6.png")
    assert last == "evaluate it: python evaluate.py --checkpoint runs/straight"
    assert "batch 4 = 1 processes x 4" in done.stdout

    log = read_log(work)
    steps = [entry for entry in log if "loss" in entry]
    last = steps[-1]
    assert last["iteration"] == 6
    both = last["decode"] + last["aux"]
    assert last["loss"] == pytest.approx(both, rel=1e-5)
    assert {"lr", "seconds", "data_seconds"} <= set(last)
    assert 0 < last["data_seconds"] < last["seconds"]
    validated = [iteration for iteration, _ in validations(work)]
    assert validated == [3, 6]

    content = content_of(work / "checkpoint_6.pt")
    assert {"model", "optimizer", "scaler", "iteration", "classes", "args"} <= set(content)
    assert content["iteration"] == 6
    assert content["args"]["arch"] == "toy_p8"


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_ends_with_the_same_weights_and_log(straight, folder, workers):
    work = folder / "runs" / f"resumed{workers}"
    os.makedirs(work)
    shutil.copy(straight[0] / "checkpoint_3.pt", work)

    run(folder, "--resume", "--work-dir", work, "--workers", workers)
    assert_ends_alike(work, straight[0])
    assert validations(work) == validations(straight[0])


def test_a_checkpoint_with_fewer_and_with_more_arguments_continues_to_the_last_bit(
    straight, folder
):
    """As earlier versions wrote it: without names of pictures and classes."""
    content = content_of(straight[0] / "checkpoint_3.pt")
    for key in ("names", "classes"):
        del content[key]
    content["skipped"] = 0
    for key in ("freeze", "layer_decay", "drop_path", "deterministic", "power", "floor"):
        del content["args"][key]
    content["args"]["weight_decay"] = None
    content["args"] |= dict(checkpoint="elsewhere/checkpoint_1.pt", work_dir="elsewhere")
    content["args"]["compile"] = None

    work = folder / "runs" / "before"
    os.makedirs(work)
    torch.save(content, work / "checkpoint_3.pt")

    done = run(folder, "--resume", "--work-dir", work)
    assert "until here" not in done.stderr
    assert_ends_alike(work, straight[0])
    assert not (folder / "elsewhere").exists()


def test_architecture_of_the_checkpoint_wins_on_resume(straight, folder, capsys):
    args, content = parse("--resume", "--work-dir", straight[0], "--arch", "deit_t16")
    assert "--arch deit_t16 is ignored: the checkpoint has toy_p8" in capsys.readouterr().err
    assert args.arch == "toy_p8"
    assert content["iteration"] == 6


def test_resume_without_a_folder_continues_the_newest_run(straight, folder, monkeypatch):
    newest = folder / "newest" / "runs"
    for name in ("first", "second"):
        shutil.copytree(straight[0], newest / name)
        os.remove(newest / name / "checkpoint_6.pt")
    os.utime(newest / "second" / "log.jsonl", (1, 1))

    monkeypatch.chdir(folder / "newest")
    args, content = parse("--resume")
    assert args.work_dir == os.path.join("runs", "first")
    assert content["iteration"] == 3


def test_paths_are_taken_as_they_are(folder):
    """With a no-break space and an escape code, which are printed in another form."""
    data, work = "my\xa0set", "my\xa0run\x1b[31m"
    shutil.copytree(folder / "set", folder / data)
    same = (*TINY, *TWO_STEPS, "--data", data, "--work-dir", work)
    done = run(folder, *same)
    assert "\x1b" not in done.stdout and "my\\xa0run\\x1b[31m" in done.stdout
    assert "iterations 2 to 4" in run(folder, *same, "--iters", 4, "--resume").stdout
    assert (folder / work / "checkpoint_4.pt").exists()


def test_the_same_command_again_and_again_starts_goes_on_and_is_done(straight, folder, capsys):
    """As a cluster repeats it. The second time it finds what the first one left half way."""
    work = folder / "runs" / "again"
    same = (*TINY, "--resume", "--work-dir", work)
    done = run(folder, *same)
    assert "holds no checkpoint yet" in done.stderr
    done = run(folder, *same)
    assert "iterations 6 to 6" in done.stdout
    assert validations(work) == validations(straight[0])

    done = run(folder, *same, "--iters", 4)  # fewer than are done
    assert "iterations 6 to 4" in done.stdout and "evaluate it" in done.stdout

    os.remove(work / "checkpoint_6.pt")
    done = run(folder, *same)
    assert "iterations 3 to 6" in done.stdout
    assert not done.stderr
    assert_ends_alike(work, straight[0])


def test_resume_of_nothing_in_particular_needs_something(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(train, "--resume")
    assert end.value.code == 2
    assert "error: runs: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("model", {}, "checkpoint_3.pt: "),
        ("optimizer", {}, "checkpoint_3.pt: "),
        ("scaler", {"scale": 1.0}, "checkpoint_3.pt: "),
        ("classes", (("wall",), [[0, 0, 0]], True, None), "its classes are not those of the ch"),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_resume_with_one_sentence(
    key, value, message, straight, folder, main, monkeypatch, capsys, tmp_path
):
    content = content_of(straight[0] / "checkpoint_3.pt")
    content[key] = value
    torch.save(content, tmp_path / "checkpoint_3.pt")
    monkeypatch.chdir(folder)

    more = ("--dtype", "float16") if key == "scaler" else ()
    with pytest.raises(SystemExit) as end:
        main(train, "--resume", "--work-dir", tmp_path, "--workers", 0, *more)
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert message in error
    assert error.count("error: ") == 1
    assert os.listdir(tmp_path) == ["checkpoint_3.pt"]


def test_files_that_are_not_a_runs_own_disturb_nothing(straight, folder):
    """A copy of a checkpoint under another name, a folder, an empty file, a backup."""
    work = folder / "runs" / "crowded"
    os.makedirs(work / "checkpoint_8.pt")
    os.makedirs(work / "backup")
    (work / "checkpoint_9.pt").touch()
    for name in ("checkpoint_3.pt", "checkpoint_best.pt", "backup/checkpoint_7.pt"):
        shutil.copy(straight[0] / "checkpoint_3.pt", work / name)

    done = run(folder, "--resume", "--work-dir", work, "--keep", 1)
    for n in (8, 9):
        assert f"checkpoint_{n}.pt: " in done.stderr
    assert "iterations 3 to 6" in done.stdout
    assert os.listdir(work / "backup") == ["checkpoint_7.pt"]
    left = {"checkpoint_6.pt", "checkpoint_8.pt", "checkpoint_9.pt", "checkpoint_best.pt"}
    assert set(os.path.basename(path) for path in work.glob("*.pt")) == left | {"best.pt"}
    assert_ends_alike(work, straight[0])


def test_without_validation_pictures_a_run_trains_and_says_so(folder):
    shutil.copytree(folder / "set", folder / "unvalidated")
    for kind in ("images", "annotations"):
        shutil.rmtree(folder / "unvalidated" / kind / "validation")

    done = run(folder, *TINY, *TWO_STEPS, "--data", "unvalidated", "--work-dir", "runs/without")
    assert not done.stderr
    assert "has no images/validation, this run trains without validating" in done.stdout
    files = os.listdir(folder / "runs/without")
    assert set(files) == {"checkpoint_2.pt", "log.jsonl"}

    done = run(folder, "--resume", "--work-dir", "runs/without")
    assert "iterations 2 to 2" in done.stdout


def relabelled(folder, name, change):
    """A copy of the data set with every label changed. -> its root"""
    root = folder / name
    shutil.copytree(folder / "set", root)
    for path in (root / "annotations").glob("*/*.png"):
        label = np.array(Image.open(path))
        changed = change(label).astype(np.uint8)
        Image.fromarray(changed).save(path)
    return root


def test_a_first_batch_that_cannot_be_read_ends_the_run_with_the_sentence_alone(capsys):
    def loader():
        raise DataError("Caught DataError in a loader\n  ade20k.DataError: x.jpg: is cut\n")
        yield

    with pytest.raises(SystemExit) as end:
        train.fetch(loader(), None, [])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the next batch cannot be read: x.jpg: is cut\n"


def test_labels_that_teach_nothing_are_said_before_training(folder):
    """A mask of 0 and 255, where 255 is no class: the only class left is always right."""

    def mask(label):
        return np.where(label % 2, 0, 255)

    root = relabelled(folder, "mask", mask)
    (root / "classes.txt").write_text("background\nthing\n")

    done = run(folder, *TINY, *TWO_STEPS, "--data", "mask", "--work-dir", "runs/mask")
    warnings = [line for line in done.stdout.splitlines() if "holds a pixel of" in line]
    for split, warning in zip(("training", "validation"), warnings, strict=True):
        assert f"{split}: none of the " in warning
        assert warning.endswith(" thing")


def test_a_warmup_that_ends_before_the_full_rate_is_said(straight, monkeypatch):
    monkeypatch.setattr(train, "data_warnings", lambda *_: [])

    def doubted(*arguments):
        args, _ = parse(*arguments)
        return list(train.doubts(args, [1], [1], None, "", {}))

    for iters, said in ((2999, 1), (3000, 0)):
        rates = [train.learning_rate(i, iters, **schedule_of("adamw")) for i in range(iters)]
        assert (max(rates) < 6e-5 / 2) is bool(said)
        assert len(doubted("--iters", iters)) == said

    (words,) = doubted("--iters", 200)
    assert "--warmup 1500 is more than half of --iters:" in words
    for arguments in ((), ("--data", "toy"), ("--iters", 200, "--warmup", 20)):
        assert not doubted(*arguments)
    assert "warning: --warmup 1500 is more than half of --iters:" in straight[1].stdout


def test_a_frozen_run_changes_neck_and_heads_alone(straight, folder):
    start = straight[0] / "checkpoint_6.pt"
    work = folder / "runs" / "frozen"
    options = (*TINY, *TWO_STEPS, "--warmup", 0, "--pretrained", start, "--work-dir", work)
    run(folder, *options, "--freeze", "--layer-decay", 0.5, "--weight-decay", 0.05)

    before = weights(start)
    after = weights(work / "checkpoint_2.pt")
    parts = set()
    for key, value in after.items():
        if not torch.equal(value, before[key]):
            parts.add(key.split(".")[0])
    assert parts == {"decode_head", "auxiliary_head"}

    groups = content_of(work / "checkpoint_2.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.05}  # 0: of one dimension

    done = run(folder, "--resume", "--work-dir", work, "--iters", 4, "--dry-run")
    assert "iterations 2 to 4" in done.stdout


@pytest.mark.parametrize(
    "change",
    [("--optimizer", "sgd"), ("--layer-decay", 0.5), ("--freeze",), ("--weight-decay", 0.1)],
)
def test_what_the_optimizers_state_depends_on_stays_on_resume(change, straight, capsys):
    before, _ = parse("--resume", "--work-dir", straight[0])
    after, _ = parse("--resume", "--work-dir", straight[0], *change)
    assert after == before
    assert f"{change[0]} {change[-1] if change[1:] else True} is ignored" in capsys.readouterr().err


@pytest.mark.parametrize("launch", [(), TWO])
def test_pretrained_file_is_used(launch, folder):
    """In several processes one reads it, and has the others have it."""
    torch.manual_seed(5)
    backbone = {}
    for key, value in build_model("toy_p8").state_dict().items():
        if key.startswith("backbone."):
            backbone[key] = value
    path = write_mmseg(backbone, folder / "backbone.pth")

    work = f"runs/pretrained{len(launch)}"
    one = ("--iters", 1, "--lr", 0, "--warmup", 0, "--pretrained", path, "--work-dir", work)
    done = run(folder, *TINY, *one, "--seed", 2**40, launch=launch)
    assert done.stdout.count("mmsegmentation") == 1

    after = weights(folder / work / "checkpoint_1.pt")["backbone.pos_embed"]
    expected = formulas.weight("backbone.pos_embed", tuple(after.shape))
    np.testing.assert_array_equal(after, expected)


def test_a_pretrained_file_that_one_process_cannot_use_ends_all(folder):
    """Without torchrun, which would kill the others: none may wait for the one that has ended."""
    port = random.randrange(20000, 40000)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = []
    for rank in (1, 0):
        process = subprocess.Popen(
            command(*TINY, "--pretrained", "absent.pth"),
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | group | {"RANK": str(rank)},
        )
        both.append(process)

    for process in both:
        _, error = process.communicate(timeout=60)
        assert "error: absent.pth: " in error
        assert process.returncode == 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ("--data", "nowhere"),
            "nowhere/images/training: no such folder, or no pictures in it (save HEIC as JPEG); a "
            "data set holds its pictures in images/",
        ),
        (("--data", "set", "--arch", "toy_p8"), "no file is known for: 'toy_p8'"),
        (("--data", "set", "--pretrained", "absent.pth"), "error: absent.pth: "),
        (("--data", "set", "--arch", "resnet50"), "invalid choice"),
        (("--data", "set", "--crop-size", "0"), "argument --crop-size: "),
        (("--data", "set", "--lr", "-1"), "argument --lr: "),
        (("--data", "set", "--lr", "nan"), "argument --lr: "),
        (("--data", "set", "--lr", "inf"), "argument --lr: inf is not a number from 0 to 1e+18"),
        (("--data", "set", "--seed", 2**64), "argument --seed: 18446744073709551616 is not a number"),
        (("--data", "set", "--workers", "-1"), "argument --workers: "),
        (("--data", "set", "--drop-path", "10"), "argument --drop-path: "),
        (("--data", "set", "--layer-decay", "65"), "argument --layer-decay: "),
        (("--data", "set", "--short-side", "-5"), "argument --short-side: "),
        (("--data", "set", "--seed", "-1"), "argument --seed: "),
        (("--data", "set", "--batch-size", "1"), "single value to normalise"),
        (("--resume", "toy.pt"), "--resume takes no file: name its folder by --work-dir."),
        (("--local-rank=0",), "torch.distributed.launch adds --local-rank: start with torchrun."),
        ((*TINY, "--work-dir", "toy.pt"), "toy.pt: is a file, or holds the checkpoints of a run"),
        ((*TINY, "--work-dir", "toy.pt", "--resume"), "or name another --work-dir"),
        ((*TINY, "--work-dir", "toy.pt", "--dry-run"), "toy.pt: is a file"),
        (
            ("--dry-run", "--data", "set", "--batch-size", 5, "--micro-batch", 2),
            "a batch of 5 pictures is not 1 processes x 2 pictures",
        ),
        (
            (*TINY, "--work-dir", "set/images/training/s0.jpg/x"),
            "Not a directory: 'set/images/training/s0.jpg/x'",
        ),
        (
            (*TINY, "--arch", "deit_t16", "--pretrained", "toy.pt"),
            "error: toy.pt: ",
        ),
    ],
)
def test_wrong_inputs_end_with_one_sentence(folder, main, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    net = build_model("toy_p8")
    torch.save({"model": net.state_dict()}, "toy.pt")
    with pytest.raises(SystemExit) as end:
        main(train, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables,message",
    [
        ({"SLURM_STEP_NUM_TASKS": 4}, "srun or mpirun started several tasks"),
        ({"OMPI_COMM_WORLD_SIZE": 2}, "srun or mpirun started several tasks"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "unset RANK and WORLD_SIZE: RANK is not below WORLD_SIZE"),
        ({"RANK": 0, "WORLD_SIZE": 0}, "unset RANK and WORLD_SIZE: RANK is not below WORLD_SIZE"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "variable MASTER_ADDR expected, but not set"),
    ],
)
def test_processes_that_do_not_know_of_each_other_end_with_one_sentence(
    variables, message, folder, main, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end:
        main(train, *TINY)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name,tasks", [("SLURM_NTASKS", 4), ("SLURM_STEP_NUM_TASKS", 1)])
def test_one_task_of_a_cluster_trains(name, tasks, folder, main, monkeypatch):
    """A shell of salloc has SLURM_NTASKS."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv(name, str(tasks))
    main(train, *TINY, "--dry-run")


@pytest.mark.parametrize(
    "error,words",
    [
        (InvalidCxxCompiler(), "--compile needs a C"),
        (MemoryError(), "the memory is too small"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the memory is too small"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "the memory is too small"),
        (RuntimeError("CUDA error: invalid device ordinal"), "start no more processes"),
        (RuntimeError("DataLoader timed out after 5 seconds"), "a process that reads pictures"),
        (RuntimeError("Connection closed by peer [127.0.0.1]"), "another process has died"),
    ],
)
def test_errors_that_a_user_can_mend_are_said_in_a_sentence_and_others_stay(error, words):
    with pytest.raises(UsageError, match=f"^{words}"), evaluate.ways_out():
        raise error
    with pytest.raises(RuntimeError, match="^required rank 4 tensor"), evaluate.ways_out():
        raise RuntimeError("required rank 4 tensor to use channels_last format")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_asks_a_run_to_stop_unless_nohup_started_it(nohup, monkeypatch):
    before = {number: signal.getsignal(number) for number in (*train.SIGNALS, signal.SIGCHLD)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        signals = train.watch_signals()
        signal.raise_signal(signal.SIGHUP)
        assert signals[:1] == ([] if nohup else [128 + 1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("launch", [(), TWO])
@pytest.mark.parametrize("data", ["set", "nowhere"])
def test_dry_run_prints_the_plan_and_writes_nothing(launch, data, folder):
    before = sorted(os.walk(folder))
    recipe = ("--arch", "vit_b16", "--neck", "mln", "--data", data, "--iters", 80000)
    said = run(folder, "--dry-run", *recipe, launch=launch).stdout

    assert f"runs/vit_b16_mln_{data}_80000: vit_b16, neck mln, 144,173,612 parameters" in said
    batch = "2 processes x 8" if launch else "1 processes x 16"
    assert f"batch 16 = {batch} pictures x 1 accumulated" in said
    assert f"{8 if data == 'set' else 0} training pictures" in said
    assert said.count("parameters") == 1
    assert sorted(os.walk(folder)) == before


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_computes_the_same_losses(folder, compiled):
    process, work = compiled
    error = process.communicate()[1]
    assert process.returncode == 0, error

    plain = folder / "runs" / "plain"
    run(folder, *TINY, *TWO_STEPS, "--work-dir", plain)
    losses = []
    for path in (work, plain):
        for entry in read_log(path):
            if "decode" in entry:
                losses.append(entry["decode"])

    # (Dropout draws other numbers in compiled code.)
    first, second = losses
    assert first == pytest.approx(second, rel=0.05)


@pytest.fixture(scope="module")
def own(folder, straight):
    """A run on three classes of one's own, from a model of ADE20K's 150."""

    def three(label):
        return np.where(label == 0, 255, label % 3)

    root = relabelled(folder, "own", three)
    (root / "classes.txt").write_text("first thing 250 0 0\nsecond\nthird 0 0 250\n")
    start = ("--pretrained", straight[0] / "checkpoint_6.pt", "--work-dir", "runs/own")
    return run(folder, *TINY, "--data", "own", *start)


def test_classes_of_ones_own_travel_with_the_checkpoint(own, folder):
    """Trained, evaluated, drawn: names, colours, values of files."""
    assert "num_classes 150" in own.stdout
    assert "decode_head.classifier.bias (the model has none, or another shape)" in own.stdout
    content = content_of(folder / "runs/own/checkpoint_6.pt")
    classes = Classes(*content["classes"])
    assert classes.names == ("first thing", "second", "third")
    assert classes.palette[0] == [250, 0, 0]
    assert classes.zero_ignored is False

    def call(*arguments, code=0):
        script = os.path.join(ROOT, "evaluate.py")
        line = [sys.executable, script, "--checkpoint", "runs/own", *arguments]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    done = call("--save-labels", "own_labels")
    assert "second" in done.stdout
    label = np.array(Image.open(folder / "own_labels/s0.png"))
    assert label.max() <= 2

    done = call("--data", "set", code=2)
    assert "knows 3 classes ('first thing', 'second', 'third'), not those of set" in done.stderr

    picture = ("--image", "set/images/validation/s0.jpg", "--show", "own_overlay")
    call(*picture, "--opacity", "1")
    overlay = Image.open(folder / "own_overlay/s0.png").convert("RGB")
    seen = {colour for count, colour in overlay.getcolors(1 << 20)}
    second = tuple(classes.palette[1])
    assert seen & {(250, 0, 0), second, (0, 0, 250)}


def test_a_run_goes_on_with_its_own_classes_alone(own, folder):
    (folder / "own" / "classes.txt").write_text("first thing 250 0 0\nsecond\nanother\n")
    done = run(folder, "--resume", "--work-dir", "runs/own", "--iters", 9, code=2)
    assert "its classes are not those" in done.stderr


def test_damaged_training_data_is_named(folder):
    shutil.copytree(folder / "set", folder / "broken")
    for i in range(8):
        path = folder / f"broken/images/training/s{i}.jpg"
        with open(path, "r+b") as file:
            file.truncate(900)  # the header is whole, the picture is not
    done = run(folder, *TINY, "--data", "broken", code=2)
    assert "cannot be read as a picture" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_iteration_waits_for_the_device_where_the_losses_come_and_needs_no_float64_there(
    optimizer, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "watch_signals", list)
    agree = train.agree
    stretches = []
    agreed = []

    def begin():
        stretches.append(Watch())
        stretches[-1].__enter__()

    def end(*arguments):
        stretches[-1].__exit__(None, None, None)

    class Loader(train.DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                begin()
                yield batch

    def watched_agreement(losses, *more):
        """All that is on the device was asked for by now; only the update is still to come."""
        end()
        agreed.append(losses.shape)
        answer = agree(losses, *more)
        begin()
        return answer

    monkeypatch.setattr(train, "DataLoader", Loader)
    monkeypatch.setattr(train, "agree", watched_agreement)
    monkeypatch.setattr(train.Log, "step", end)
    options = (*TINY, "--optimizer", optimizer, "--micro-batch", 2, "--workers", 0)
    train.train(*parse(*options, "--work-dir", tmp_path))

    assert agreed == [(3,)] * 6
    assert len(stretches) == 12
    for stretch in stretches:
        assert stretch.operations
        assert not stretch.waits
        assert not stretch.doubles


@pytest.mark.parametrize("count,world", [(24, 1), (40, 8), (24, 8), (5, 2), (3, 1)])
def test_a_validation_draws_four_different_pictures_spread_over_the_set(
    count, world, tmp_path, monkeypatch
):
    """Of those that rank 0 has, or all of them where it has fewer."""
    drawn = []

    def evaluate_(model, pairs, classes, rank, world, workers, look, **how):
        for i in range(rank, len(pairs), world):
            look(i, f"image {i}", "label", "prediction")
        return np.eye(2, dtype=np.int64)

    def sheet(rows, classes):
        drawn.extend(int(row[0].removeprefix("image ")) for row in rows)

    monkeypatch.setattr(train, "evaluate", evaluate_)
    monkeypatch.setattr(train, "sheet", sheet)
    args = SimpleNamespace(iters=9, workers=0, short_side=32, work_dir=str(tmp_path))
    model = SimpleNamespace(buffers=list)
    log = train.Log(args, 0, {})
    train.validate(log, 3, [], model, [None] * count, Classes(("a", "b")), None, world)

    own = len(range(0, count, world))
    assert len(drawn) == len(set(drawn)) == min(4, own)
    assert drawn[0] == 0
    if own >= 8:
        assert all(k * count / 4 <= i < (k + 1) * count / 4 for k, i in enumerate(drawn))


@pytest.mark.parametrize("rank", [0, 1])
def test_between_the_lines_of_a_run_a_terminal_shows_how_far_it_is(rank, monkeypatch):
    said = []
    monkeypatch.setattr(train, "progress", said.append)
    log = train.Log(SimpleNamespace(iters=800, batch_size=4), rank, {})
    row = [3.0, 2.0, 1.0, 0.5, 0.1]
    log.step(7, row, 0.1)
    log.step(8, [math.nan, math.nan, 1.0, 0.5, 0.1], 0.1)
    assert log.steps == [row]
    assert said == (["7 of 800 iterations", "8 of 800 iterations"] if rank == 0 else [])


def test_a_line_has_the_means_of_the_steps_that_were_taken(capsys, tmp_path):
    log = train.Log(SimpleNamespace(iters=100, work_dir=str(tmp_path)), 0, {})
    log.step(48, [3.0, 2.0, 1.0, 0.5, 0.1], 0.1)
    log.step(49, [math.inf, 2.0, math.inf, 9.0, 0.1], 0.1)
    log.step(50, [4.0, 2.0, 2.0, 1.5, 0.3], 0.1)
    (entry,) = read_log(tmp_path)
    want = dict(iteration=50, loss=3.5, decode=2, aux=1.5, lr=0.1, seconds=1, data_seconds=0.2)
    assert entry == pytest.approx(want)
    assert "0:00:50 left" in capsys.readouterr().out

    log.step(100, [math.nan, math.nan, 1.0, 0.5, 0.1], 0.1)  # no step, no line
    assert len(read_log(tmp_path)) == 1


def test_a_toy_run_ends_with_what_to_try_next(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "watch_signals", list)
    monkeypatch.setattr(train, "data_root", lambda name: {"toy": "set"}[name])
    options = ("--data", "toy", "--iters", 1, "--crop-size", 32, "--short-side", 32)
    train.train(*parse(*options, "--workers", 0, "--work-dir", tmp_path))
    out = capsys.readouterr().out
    assert out.endswith(f"{tmp_path}/sheet_1.png\nevaluate it: python evaluate.py --checkpoint "
                        f"{tmp_path}\n{train.AFTER_TOY}\n")

    commands = [line.split() for line in train.AFTER_TOY.splitlines() if "python " in line]
    assert len(commands) == 2
    for _, script, *_ in commands:
        assert os.path.exists(os.path.join(ROOT, script))
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        assert "## Your own data" in file.read()


def test_toy_has_defaults_of_its_own_and_what_is_given_wins():
    args, _ = parse("--data", "toy", "--iters", 9)
    assert args.arch == "toy_p8"
    assert args.pretrained == "none"
    assert args.iters == 9
    assert args.interval == 200
    assert args.crop_size == train.TOY["crop_size"]


def test_help_shows_the_defaults(capsys):
    args, _ = parse()
    with pytest.raises(SystemExit):
        parse("--help")
    words = capsys.readouterr().out.split()
    text = " ".join(words)
    text = text[text.index("recipe:") :]

    def help_of(key):
        start = text.index(f" --{key.replace('_', '-')} ")
        return text[start : text.index(")", start) + 1]

    for key in ("arch", "iters", "batch_size", "crop_size", "pretrained", "seed"):
        assert f"({getattr(args, key)})" in help_of(key), key
    for key in ("lr", "warmup", "weight_decay"):
        for name, defaults in train.OPTIMIZERS.items():
            assert f"{name} {defaults[key]}" in help_of(key)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_decides_what_is_not_given(name):
    args, _ = parse("--optimizer", name)
    assert train.OPTIMIZERS[name].items() <= vars(args).items()
    args, _ = parse("--optimizer", name, "--lr", 0, "--warmup", 0, "--weight-decay", 0)
    assert (args.lr, args.warmup, args.weight_decay) == (0, 0, 0)
    args, _ = parse("--optimizer", name, "--data", "toy")
    assert (args.lr, args.warmup) == (train.TOY["lr"], train.TOY["warmup"])
    assert args.weight_decay == train.OPTIMIZERS[name]["weight_decay"]


def test_plain_defaults_are_the_published_recipe():
    args, _ = parse()
    assert args.arch == "deit_s16"
    assert args.pretrained == "auto"
    assert (args.iters, args.interval, args.batch_size) == (160000, 16000, 16)
    assert (args.crop_size, args.short_side) == (512, 512)
    assert args.optimizer == "adamw"
    assert args.lr == 6e-5
    assert args.warmup == 1500
    assert args.data == "data/ade/ADEChallengeData2016"
