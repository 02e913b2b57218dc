"""What a GPU alone can show: CUDA beside the CPU, number formats, NCCL, memory, waiting. Skipped
where there is none; elsewhere an answer in about three minutes.

    python -m pytest tests/test_cuda.py -rP    # prints what was measured too
"""

import os
import shutil
import subprocess
import sys
import warnings

import formulas
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, draw_set
from test_model import check_batch_norm_over_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evaluate
import train
from ade20k import normalise
from upernet import build_model

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(autouse=True)
def plain_float32(monkeypatch):
    """Products of float32 as such, not rounded to TF32's 10 bits. (cuDNN does so by default.)"""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(arch="deit_t16", sure=False):
    """A model of six classes with nothing random in it, as new, or sure of its labels."""
    torch.manual_seed(0)
    net = build_model(arch, "ln_mln", 6)
    if sure:
        nn.init.normal_(net.decode_head.classifier.weight)

    net.backbone.drop_path = 0.0
    for module in net.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return net


def batch(device, count=2):
    """Two or four pictures of 97 x 131 pixels, whose last patches hang over, and labels of six
    classes."""
    picture = torch.from_numpy(formulas.picture(97, 131))
    image = picture.permute(2, 0, 1)  # (3, 97, 131) uint8
    images = torch.stack([image, image.flip(2), image.flip(1), image.flip(1, 2)][:count])

    labels = torch.from_numpy(formulas.labels(97, 131, count))
    labels = labels.where(labels == 255, labels % 6)
    return normalise(images.to(device)), labels.to(device)


def backward(net, device, dtype=torch.float32, scale=1.0, count=2):
    """-> loss, and the gradients of all parameters as they are in float32, both on the CPU."""
    x, labels = batch(device, count)
    memory_format = evaluate.memory_format(device, dtype)
    x = x.contiguous(memory_format=memory_format)
    with evaluate.autocast(device, dtype):
        loss, _ = net(x, labels)
    assert loss.dtype == torch.float32

    scaled = loss * scale
    scaled.backward()
    grads = []
    for parameter in net.parameters():
        grad = parameter.grad / scale
        grads.append(grad.cpu())
    return loss.detach().cpu(), grads


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def direction(grads, others):
    """The cosine of the angle between two lists of gradients."""
    first = flat(grads).double()
    second = flat(others).double()
    return torch.cosine_similarity(first, second, dim=0).item()


def assert_finite(tensors):
    for tensor in tensors:
        assert tensor.isfinite().all()


# ---- the same numbers ----


def test_logits_gradients_and_labels_are_those_of_the_cpu():
    picture = formulas.picture(200, 300)
    found = []
    for device in (CPU, DEVICE):
        net = evaluate.prepare(network(sure=True), device, torch.float32, False)
        x, _ = batch(device)

        net.eval()
        with torch.no_grad():
            logits = net(x).cpu()
        labels = evaluate.predict(net, picture, (0.5, 1.0, 1.5), flip=True, short=96)

        net.train()
        loss, grads = backward(net, device)
        found.append((logits, labels, loss, grads))

    (logits, labels, loss, grads), (logits_here, labels_here, loss_here, grads_here) = found
    error = (logits_here - logits).abs().max()
    assert error <= 1e-4 * logits.abs().max()
    same = labels_here == labels
    assert same.mean() > 0.999
    torch.testing.assert_close(loss_here, loss, rtol=1e-5, atol=0)

    # Where an activation is within rounding of 0, the ReLU behind it may fall on either side.
    whole = flat(grads).norm()
    names = [name for name, _ in net.named_parameters()]
    for name, want, got in zip(names, grads, grads_here, strict=True):
        error = (got - want).norm()
        assert error <= 1e-2 * want.norm() + 1e-6 * whole, name
    assert direction(grads_here, grads) > 1 - 1e-6


def test_bfloat16_labels_are_those_of_float32():
    net = evaluate.prepare(network(sure=True).eval(), DEVICE, torch.bfloat16, False)
    x, _ = batch(DEVICE)
    picture = formulas.picture(200, 300)

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            logits = evaluate.view_logits(net, x, dtype)
        labels = evaluate.predict(net, picture, (1.0, 1.5), True, 96, dtype)
        found.append((logits, labels))

    (logits, labels), (logits16, labels16) = found
    assert logits16.dtype == torch.float32
    assert not torch.equal(logits, logits16)
    same = labels16 == labels
    assert same.mean() > 0.98


@pytest.mark.parametrize(
    "dtype,scale,cosine", [(torch.bfloat16, 1.0, 0.98), (torch.float16, 1024.0, 0.99)]
)
def test_gradients_in_16_bits_point_where_those_of_float32_do(dtype, scale, cosine):
    """(On a CPU the cosine of bfloat16 is 0.997. Two pictures would not do, 0.84 to 0.97: two values
    in the 1x1 pooling are normalised to 1 and -1, so a small error in them can turn the sign.)"""
    net = evaluate.prepare(network(), DEVICE, torch.float32, False)
    loss, grads = backward(net, DEVICE, count=4)
    net = evaluate.prepare(network(), DEVICE, dtype, False)
    loss16, grads16 = backward(net, DEVICE, dtype, scale, count=4)

    assert_finite(grads16)
    assert direction(grads16, grads) > cosine
    torch.testing.assert_close(loss16, loss, rtol=1e-2, atol=0)


def test_float16_with_the_scaler_trains_a_published_model_at_its_size():
    """Its sums are the longest there are: 65504, the largest number of float16, must be enough."""
    net, optimizer = published("deit_s16", "mln", torch.float16)
    scaler = torch.amp.GradScaler(DEVICE.type)
    weight = net.decode_head.classifier.weight
    before = weight.detach().clone()

    for _ in range(4):
        loss = step(net, optimizer, torch.float16, scaler)
        assert loss.isfinite()

    assert scaler.get_scale() >= 2**13  # of 2^16 at first: of four steps one at least was taken
    assert not torch.equal(weight, before)
    assert_finite(net.parameters())


def test_compiled_parts_compute_the_same():
    """(In float32, where nothing hides what may be wrong.)"""
    plain = evaluate.prepare(network("toy_p8"), DEVICE, torch.float32, False)
    compiled = evaluate.prepare(network("toy_p8"), DEVICE, torch.float32, True)

    loss, grads = backward(plain, DEVICE)
    loss_compiled, grads_compiled = backward(compiled, DEVICE)

    torch.testing.assert_close(loss_compiled, loss, rtol=1e-4, atol=0)
    assert direction(grads_compiled, grads) > 1 - 1e-5


# ---- processes ----


@pytest.fixture
def world_of_one():
    """The group of processes that setup_processes makes, with a single one in it."""
    of_device = dist.get_default_backend_for_device(DEVICE)
    backend = f"cpu:gloo,{DEVICE.type}:{of_device}"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype,most", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_batch_norm_over_two_processes_on_one_gpu_is_that_of_one(dtype, most, tmp_path):
    """By gloo: NCCL refuses two processes on one GPU."""
    check_batch_norm_over_processes((2,), DEVICE, dtype, most, tmp_path)


def test_a_step_with_ddp_is_the_plain_step(world_of_one):
    plain = evaluate.prepare(network(), DEVICE, torch.float32, False)
    shared = evaluate.prepare(network(), DEVICE, torch.float32, False)

    loss, grads = backward(plain, DEVICE)
    loss_shared, grads_shared = backward(DistributedDataParallel(shared), DEVICE)
    torch.testing.assert_close(loss_shared, loss, rtol=1e-5, atol=0)
    assert direction(grads_shared, grads) > 1 - 1e-6

    for (name, want), got in zip(plain.named_buffers(), shared.buffers()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)

    for net in (plain, shared):
        optimizer = train.build_optimizer(net, "sgd", 1e-3)
        optimizer.step()
    for want, got in zip(plain.parameters(), shared.parameters()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- memory and waiting ----


def published(arch, neck, dtype):
    """-> a published model and its optimizer on the device, as training has them."""
    torch.manual_seed(0)
    with DEVICE:
        net = build_model(arch, neck)
    net = evaluate.prepare(net, DEVICE, dtype, False)
    return net, train.build_optimizer(net, "adamw", 6e-5)


def step(net, optimizer, dtype, scaler):
    """One step of the loop on two random crops of 512 x 512 pixels. -> loss"""
    images = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(0, 150, (2, 512, 512), device=DEVICE)
    memory_format = evaluate.memory_format(DEVICE, dtype)
    x = normalise(images).contiguous(memory_format=memory_format)
    with evaluate.autocast(DEVICE, dtype):
        loss, _ = net(x, labels)

    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize(
    "arch,neck,most",
    [
        ("deit_s16", "none", 4.68),
        ("deit_s16", "mln", 5.69),
        ("deit_b16", "none", 7.75),
        ("vit_b16", "mln", 9.20),
    ],
)
def test_a_step_of_two_pictures_takes_less_memory_than_the_published_run(arch, neck, most):
    """Published: GB of a V100 in float32, for the two pictures of each of eight GPUs."""
    torch.cuda.empty_cache()
    net, optimizer = published(arch, neck, torch.float32)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    torch.cuda.reset_peak_memory_stats()

    for _ in range(2):  # the first one makes the optimizer's state
        step(net, optimizer, torch.float32, scaler)

    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{arch} {neck}: {peak:.2f} GB, published {most}")
    assert peak < most


TINY = (
    *("--data", "set", "--arch", "toy_p8", "--pretrained", "none", "--lr", 1e-3, "--warmup", 0),
    *("--iters", 6, "--interval", 3, "--batch-size", 4, "--workers", 1),
    *("--crop-size", 128, "--short-side", 128),  # 16 x 16 patches, as its table of positions has
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    draw_set(folder / "set", 8, 2)
    return folder


def waits_among(caught):
    """What torch.cuda.set_sync_debug_mode("warn") said, of all warnings."""
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "synchronizing CUDA" in message]


@pytest.mark.parametrize("optimizer,dtype", [("sgd", "float32"), ("adamw", "float16")])
def test_an_iteration_waits_for_the_gpu_only_for_its_losses(optimizer, dtype, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "watch_signals", list)
    step = train.Log.step

    class Loader(train.DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                torch.cuda.set_sync_debug_mode("warn")
                yield batch

    def end(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        step(*arguments)

    monkeypatch.setattr(train, "DataLoader", Loader)
    monkeypatch.setattr(train.Log, "step", end)
    options = [*TINY, "--optimizer", optimizer, "--dtype", dtype, "--micro-batch", 2]
    options += ["--work-dir", tmp_path]
    words = [str(option) for option in options]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train.train(*train.parse(words))
    # The one wait of an iteration is for an event, which torch does not report.
    assert waits_among(caught) == []


def test_a_prediction_waits_for_the_pictures_it_sends_and_the_labels_it_gets():
    net = network("toy_p8", sure=True).eval()
    net = evaluate.prepare(net, DEVICE, torch.float32, False)
    picture = formulas.picture(300, 400)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        evaluate.predict(net, picture, (0.5, 1.0, 1.5), flip=True, short=128)
        torch.cuda.set_sync_debug_mode("default")

    assert 1 <= len(waits_among(caught)) <= 3 + 1


# ---- whole runs ----


def run(folder, *arguments, script="train.py"):
    command = [sys.executable, os.path.join(ROOT, script)]
    command += [str(argument) for argument in arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def straight(folder):
    """A run in float16, so that the scaler has a state, with kernels of a fixed order."""
    done = run(folder, *TINY, "--deterministic", "--dtype", "float16", "--work-dir", "straight")
    assert f"float16 on 1 x {DEVICE.type}" in done.stdout
    assert "deterministic" not in done.stderr  # no operation that has no fixed order
    return folder / "straight"


def content(work):
    return torch.load(work / "checkpoint_6.pt", weights_only=True, map_location="cpu")


def assert_equal(work, other):
    got = content(work)
    want = content(other)
    assert got["scaler"] == want["scaler"]
    assert got["scaler"]["scale"] > 0

    for name, value in want["model"].items():
        assert torch.equal(got["model"][name], value), name

    states = got["optimizer"]["state"]
    wanted_states = want["optimizer"]["state"]
    assert states.keys() == wanted_states.keys()
    for number, state in wanted_states.items():
        for name, value in state.items():
            assert torch.equal(states[number][name], value), (number, name)


def test_a_deterministic_run_gives_the_same_weights_twice(straight, folder):
    options = ("--deterministic", "--dtype", "float16", "--work-dir", "again")
    run(folder, *TINY, *options)
    assert_equal(folder / "again", straight)


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(straight, folder):
    os.makedirs(folder / "resumed")
    shutil.copy(straight / "checkpoint_3.pt", folder / "resumed")
    done = run(folder, "--resume", "--work-dir", "resumed")
    assert "iterations 3 to 6" in done.stdout
    assert_equal(folder / "resumed", straight)


def test_a_run_of_the_gpu_is_evaluated_and_told_the_device(straight, folder):
    options = ("--checkpoint", "straight", "--json", "scores.json")
    done = run(folder, *options, script="evaluate.py")
    assert f"2 pictures on {DEVICE.type}" in done.stdout
    assert "mIoU" in done.stdout
