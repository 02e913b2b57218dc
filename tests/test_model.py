"""model.py and upernet.py against the real mmsegmentation 0.17.0 (goldens) and against plain
computations."""

from contextlib import nullcontext
from functools import partial

import formulas
import numpy as np
import pytest
import speed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Watch, assert_equal, by_formula, largest_error, load, tensors, write_mmseg
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ade20k
import evaluate
import model
import upernet
from convert_weights import MMSEG, load_into, load_weights, rename, to_mmseg
from model import build_backbone
from upernet import build_model


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def bilinear(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def assert_exact(got, want):
    """Except for the rounding of float64."""
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def formula_batch(count):
    """The pictures and labels that the reference was given."""
    images = formulas.image(97, 131, count)
    labels = formulas.labels(97, 131, count)
    return torch.from_numpy(images), torch.from_numpy(labels)


def random_batch(height, width, classes):
    """Two pictures and their labels."""
    images = torch.randn(2, 3, height, width)
    labels = torch.randint(0, classes, (2, height, width))
    return images, labels


def check_logits(net, gold):
    for h, w in formulas.SIZES:
        image = formulas.image(h, w)
        with torch.inference_mode():
            logits = net(torch.from_numpy(image))
        assert logits.shape == (1, 150, h, w)

        got = formulas.samples(logits)
        want = gold[f"logits_{h}x{w}"]
        largest = gold[f"max_{h}x{w}"]
        assert largest_error(got, want) <= 1e-4 * largest, (h, w)


def check_loss(net, gold):
    images, labels = formula_batch(4)
    with torch.no_grad():
        loss, parts = net(images, labels)

    got = [loss.item(), parts["decode"], parts["aux"]]
    np.testing.assert_allclose(got, gold["loss"], rtol=1e-5)


def check_gradients(net, gold):
    """In float64 on both sides: in float32 an activation within rounding of 0 is on either side of
    its ReLU by chance."""
    images, labels = formula_batch(2)
    net.double()
    loss, _ = net(images.double(), labels)
    loss.backward()

    theirs = {ours: name for name, ours in MMSEG.items()}
    grads = {}
    for name, parameter in net.named_parameters():
        grads[rename(name, theirs)] = parameter.grad
    names = gold["grad_names"]
    assert set(grads) == set(names)

    scales = gold["grad_max"]
    smallest = 1e-12 * scales.max()
    for name, want, scale in zip(names, gold["grads"], scales):
        if scale > smallest:  # a bias in front of a BatchNorm has an exact gradient of 0
            got = formulas.samples(grads[name], len(want))
            error = largest_error(got, want)
            assert error <= 1e-3 * scale, (name, error, scale)


def without_drop_path(arch):
    settings = {}
    for key, value in model.ARCHS[arch].items():
        if "drop_path" not in key:
            settings[key] = value
    return settings


@pytest.mark.parametrize("arch,neck", formulas.PAIRS)
def test_logits_loss_and_gradients_equal_the_reference(arch, neck, golden, filled):
    gold = golden(f"{arch}_{neck}")

    # Except for drop path, DeiT-B with a neck is ViT-B again: for the reference, and so for us.
    if arch == "deit_b16" and neck != "none":
        twin = golden(f"vit_b16_{neck}")
        answers = set(gold.files) - {"drop_path"}
        for key in answers:
            assert np.array_equal(gold[key], twin[key]), key
        assert without_drop_path(arch) == without_drop_path("vit_b16")
        return

    net = filled(arch, neck)
    sizes = [parameter.numel() for parameter in net.parameters()]
    assert sum(sizes) == gold["parameters"]
    net.eval()
    check_logits(net, gold)

    net.train()
    check_loss(net, gold)
    check_gradients(net, gold)  # the running averages, which have moved, take no part in training


@pytest.mark.parametrize("arch,neck", formulas.PAIRS)
def test_drop_path_rates_are_the_released_configs(arch, neck, golden):
    with torch.device("meta"):
        net = build_model(arch, neck)

    gold = golden(f"{arch}_{neck}")
    assert net.backbone.drop_path == gold["drop_path"]


def test_state_dict_in_their_names_has_exactly_their_keys(golden):
    with torch.device("meta"):
        net = build_model("deit_s16", "ln_mln")
    got = to_mmseg(net.state_dict())
    want = golden("deit_s16_ln_mln")["keys"]
    assert set(got) == set(want)


def test_deit_t16_is_192_wide_with_3_heads():
    with torch.device("meta"):
        backbone = build_model("deit_t16", "mln").backbone
    assert backbone.cls_token.shape == (1, 1, 192)
    assert backbone.pos_embed.shape == (1, 1025, 192)
    assert len(backbone.blocks) == 12
    assert backbone.blocks[0].attn.heads == 3


def cubic_kernel(t, a=-0.75):
    """The cubic kernel of torch."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * (t**3 - 5 * t**2 + 8 * t - 4)
    return 0


def test_pos_embed_is_resized_whenever_the_grid_differs_not_the_number_of_tokens():
    pos = torch.randn(1, 1025, 8)

    resized = model.resize_pos_embed(pos, (32, 32), (16, 64))  # 1024 tokens too
    assert resized.shape == pos.shape
    assert not torch.equal(resized, pos)
    of_class_token = pos[:, 0]
    assert torch.equal(resized[:, 0], of_class_token)

    # By hand, along one axis of a 4 x 1 grid doubled.
    column = normal(4)
    class_token = torch.zeros(1, dtype=torch.float64)
    table = torch.cat([class_token, column])
    resized = model.resize_pos_embed(table.view(1, 5, 1), (4, 1), (8, 1))
    got = resized[0, 1:, 0]

    for i in range(8):
        place = (i + 0.5) / 2 - 0.5
        before = int(np.floor(place))

        want = 0
        for near in range(before - 1, before + 3):
            inside = min(max(near, 0), 3)
            weight = cubic_kernel(place - near)
            want += weight * column[inside]

        error = abs(got[i] - want)
        assert error < 1e-12


def test_drop_path_leaves_out_more_pictures_from_layer_to_layer_and_keeps_the_mean():
    torch.manual_seed(0)
    keep = model.drop_path_factors(0.3, 4, 20000, "cpu")
    assert keep.shape == (4, 2, 20000, 1, 1)

    for layer, rate in zip(keep, [0, 0.1, 0.2, 0.3], strict=True):
        values = {0, 1 / (1 - rate)} if rate else {1}
        assert sorted(layer.unique().tolist()) == pytest.approx(sorted(values))
        left_out = (layer == 0).double().mean((1, 2, 3))  # of each branch
        assert abs(left_out - rate).max() < 0.015
        assert abs(layer.mean() - 1) < 0.015


def test_drop_path_skips_the_branches_of_a_picture_in_training_only(monkeypatch):
    torch.manual_seed(0)
    net = build_backbone("toy_p8", "none").double()
    images = normal(2, 3, 16, 24)
    plain = [x.clone() for x in net.eval()(images)]
    net.drop_path = 0.5
    for got, want in zip(net(images), plain):
        assert torch.equal(got, want)

    def second_picture_stays(rate, depth, B, device):
        assert (rate, depth, B) == (0.5, 4, 2)
        return torch.tensor([0.0, 1.0]).expand(depth, 2, B)[..., None, None]

    monkeypatch.setattr(model, "drop_path_factors", second_picture_stays)
    maps = net.train()(images)
    for got, want in zip(maps, plain):
        assert_exact(got[1], want[1])
        assert torch.equal(got[0], maps[0][0])  # no layer adds anything


def test_attention_is_the_plain_formula():
    torch.manual_seed(0)
    layer = model.Attention(12, 3).double()
    x = normal(2, 5, 12)
    qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    queries, keys, values = qkv.chunk(3, dim=-1)

    heads = []
    for first in (0, 4, 8):
        head = slice(first, first + 4)
        q = queries[..., head]
        k = keys[..., head]
        v = values[..., head]
        scores = q @ k.transpose(1, 2)
        scores = scores / 4**0.5
        weights = scores.softmax(-1)
        heads.append(weights @ v)

    mixed = torch.cat(heads, -1)
    want = F.linear(mixed, layer.proj.weight, layer.proj.bias)
    torch.testing.assert_close(layer(x), want)


# ---- Resizing is two small matrices ----

# (h, w) -> (H, W): equal, twice, odd, one pixel, thin, not by whole numbers, smaller.
RESIZED = [
    ((4, 6), (4, 6)),
    ((4, 6), (8, 12)),
    ((5, 7), (9, 13)),
    ((1, 1), (6, 5)),
    ((1, 7), (1, 20)),
    ((3, 1), (4, 1)),
    ((6, 4), (7, 11)),
    ((8, 9), (5, 3)),
]


@pytest.mark.parametrize("old,new", RESIZED)
def test_resize_matrices_are_bilinear_resizing(old, new):
    h, w = old
    H, W = new
    x = normal(2, 3, h, w)
    rows = upernet.resize_matrix(h, H, x)
    columns = upernet.resize_matrix(w, W, x)
    got = rows @ x @ columns.mT

    want = bilinear(x, new)
    assert_exact(got, want)
    read = rows.count_nonzero(1)
    assert read.max() <= 2
    ones = torch.ones(H, dtype=torch.float64)
    torch.testing.assert_close(rows.sum(1), ones)


@pytest.mark.parametrize("old,new", [(4, 8), (32, 512), (7, 3), (1, 9), (9, 1), (128, 97)])
def test_resize_matrix_mixes_the_two_nearest_pixels_by_distance(old, new):
    like = torch.zeros((), dtype=torch.float64)
    got = upernet.resize_matrix(old, new, like).numpy()

    pixels = np.arange(old)
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        place = np.clip(place, 0, old - 1)
        want = 1 - np.abs(place - pixels)
        want = np.maximum(want, 0)
        assert largest_error(got[i], want) < 1e-12


# From so many pixels to so many averages.
POOLED = [
    (32, 6),
    (7, 3),
    (5, 6),  # more averages than pixels
    (1, 2),
    (40, 1),
    (13, 6),
    (6, 6),
]


def norm_of_a_part(rank, worlds, device, dtype, folder):
    """Runs in a process: normalise this process's part of four pictures, forward and backward."""
    torch.set_num_threads(1)
    for world in worlds:
        if rank >= world:
            continue
        store = dist.FileStore(f"{folder}/store_{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        k = 4 // world
        result = norm_of(slice(rank * k, rank * k + k), device, dtype)
        torch.save(result, f"{folder}/{world}_{rank}.pt")
        dist.destroy_process_group()


def norm_of(part, device, dtype):
    """-> (what the parts have for themselves, what they share, the gradients to be added up)"""
    torch.manual_seed(0)
    x = (3 * normal(4, 6, 5, 7) + 50).to(dtype)[part].to(device).requires_grad_()
    grad = normal(4, 6, 5, 7).to(dtype)[part].to(device)
    layer = upernet.BatchNorm(6).to(device, torch.promote_types(dtype, torch.float32))
    nn.init.uniform_(layer.weight, 0.5, 1.5)

    y = layer(x)
    y.backward(grad)
    return (y.detach(), x.grad), tuple(layer.buffers()), (layer.weight.grad, layer.bias.grad)


def check_batch_norm_over_processes(worlds, device, dtype, most, folder):
    """Whatever the number of processes, the result is that of torch's layer in one."""
    (y, x_grad), shared, added = norm_of(slice(0, 4), device, dtype)
    arguments = (worlds, device, dtype, str(folder))
    torch.multiprocessing.spawn(norm_of_a_part, arguments, nprocs=max(worlds))

    for world in worlds:
        parts = [torch.load(f"{folder}/{world}_{rank}.pt") for rank in range(world)]
        pairs = [(torch.cat([part[0][0] for part in parts]), y)]
        pairs += [(torch.cat([part[0][1] for part in parts]), x_grad)]
        pairs += [(got, want) for part in parts for got, want in zip(part[1], shared)]
        pairs += [(sum(part[2][k] for part in parts), added[k]) for k in (0, 1)]
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=most, atol=most)


@pytest.mark.parametrize("dtype,most", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_batch_norm_over_two_and_four_processes_is_that_of_one(dtype, most, tmp_path):
    check_batch_norm_over_processes((2, 4), torch.device("cpu"), dtype, most, tmp_path)


@pytest.mark.parametrize("old,new", POOLED)
def test_average_pooling_by_matrices_is_the_adaptive_one_also_where_sizes_do_not_divide(old, new):
    x = normal(2, 3, old, 4)
    got = upernet.average_pool(x, new)
    want = F.adaptive_avg_pool2d(x, new)
    assert_exact(got, want)


@pytest.mark.parametrize("old,new", RESIZED)
def test_convolution_of_the_small_map_equals_the_one_of_the_resized_and_passes_gradcheck(old, new):
    torch.manual_seed(0)
    x = normal(2, 3, *old).requires_grad_()
    weight = normal(4, 3, 3, 3).requires_grad_()
    total = normal(2, 4, *new).requires_grad_()

    def convolve(total, x, weight):
        no_leaf = total * 1  # what it adds to is written over
        return upernet.add_upsampled_conv3x3(no_leaf, x, weight)

    resized = bilinear(x, new)
    want = total + F.conv2d(resized, weight, padding=1)
    got = convolve(total, x, weight)
    assert_exact(got, want)
    assert torch.autograd.gradcheck(convolve, (total, x, weight))


@pytest.mark.parametrize("size", [(4, 6), (1, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_maps_come_out_in_the_layout_they_came_in(size, layout, training):
    x = torch.randn(2, 8, *size).contiguous(memory_format=layout).requires_grad_(training)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    h, w = size
    small = torch.randn(2, 8, 1, 2).contiguous(memory_format=layout)
    weight = torch.randn(8, 16, 3, 3)

    with torch.set_grad_enabled(training):
        results = [
            upernet.conv3x3_of_upsampled(x, 2, conv),
            upernet.conv3x3_of_resized([x, small], weight),
            upernet.conv3x3_of_resized([x, x], weight.contiguous(memory_format=layout)),
        ]
    for result in results:
        assert result.is_contiguous(memory_format=layout)
    if training:
        for result in results:
            (grad,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
            assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("size", [(4, 6), (1, 1), (1, 7)])
def test_convolution_of_the_small_map_with_bias_equals_the_one_of_the_upsampled(scale, size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).double()
    x = normal(2, 3, *size)
    h, w = size

    resized = bilinear(x, (scale * h, scale * w))
    got = upernet.conv3x3_of_upsampled(x, scale, conv)
    assert_exact(got, conv(resized))


def test_convolution_over_maps_of_many_sizes_equals_the_one_of_all_resized_side_by_side():
    torch.manual_seed(0)
    sizes = [(9, 13), (5, 7), (9, 13), (3, 1), (1, 1)]
    widths = [2, 3, 1, 4, 2]
    maps = []
    for width, size in zip(widths, sizes, strict=True):
        maps.append(normal(2, width, *size))
    weight = normal(5, sum(widths), 3, 3)

    resized = [bilinear(x, (9, 13)) for x in maps]
    beside = torch.cat(resized, 1)
    want = F.conv2d(beside, weight, padding=1)
    got = upernet.conv3x3_of_resized(maps, weight)
    assert_exact(got, want)


# From so many rows to so many.
ROWS = [
    (4, 11),
    (32, 512),  # patches of 16 pixels
    (7, 3),
    (1, 9),
    (9, 9),
    (128, 683),
]


@pytest.mark.parametrize("old,new", ROWS)
def test_source_rows_are_all_the_rows_that_are_read_and_hardly_more(old, new):
    like = torch.zeros((), dtype=torch.float64)
    matrix = upernet.resize_matrix(old, new, like)
    for start in range(0, new, 3):
        stop = min(start + 3, new)
        first, last = upernet.source_rows(start, stop, old, new)
        assert 0 <= first
        assert last <= old

        used = matrix[start:stop].any(0)
        (read,) = used.nonzero(as_tuple=True)
        top = read[0]
        bottom = read[-1]
        assert first <= top <= first + 1
        assert last - 2 <= bottom < last


MOST_OPERATIONS = [
    ("deit_s16", "none", 105),
    ("deit_s16", "mln", 310),
    ("deit_b16", "none", 262),
    ("vit_b16", "mln", 505),
]


@pytest.mark.parametrize("arch,neck,most", MOST_OPERATIONS)
def test_operations_of_a_512x512_picture_stay_below(arch, neck, most):
    """In units of 10^9. With each map resized before it is convolved: 122, 550, 277, 887."""
    operations = speed.count_flops(arch, neck, 512, 512)
    assert operations <= most * 1e9


VIEWS = """view reshape permute transpose t expand slice select unsqueeze squeeze split
split_with_sizes unbind detach alias _unsafe_view as_strided lift_fresh device""".split()


@pytest.mark.parametrize("neck,most", [("none", 1150), ("mln", 1400)])
def test_launches_of_a_training_step_stay_below(neck, most, monkeypatch):
    """DeiT-S with two pictures in bfloat16, forward and backward, as a GPU gets it; on tensors that
    have no numbers. 1446 and 1731 when each layer drew for itself and small maps were not
    resized."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, std: x)  # (asks for numbers)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(upernet, "rows_at_once", lambda device, row: max(1, 2**26 // row))

    with FakeTensorMode():
        net = build_model("deit_s16", neck)
        images = torch.zeros(2, 3, 512, 512).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(2, 512, 512, dtype=torch.int64)
        with Watch() as step:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, _ = net(images, labels)
            loss.backward()
    launches = [name for name in step.operations if name not in VIEWS]
    print(len(launches), "launches")
    assert len(launches) <= most
    assert not step.waits


def test_operations_are_counted_as_the_formula_does():
    """deit_t16 at 64x96: 24 patches and the class token, 12 layers; the head's maps are all 4x6."""
    n, d, c = 25, 192, 512
    patch = 3 * 16 * 16
    patches = 24 * patch * d
    layer = 12 * n * d * d  # qkv, proj, MLP
    layer += 2 * n * n * d  # scores and mixing

    place = 9 * d * c  # the bottleneck, of the last map
    place += 3 * d * c  # lateral, 1x1
    place += 3 * 9 * c * c  # fpn, 3x3
    place += 9 * 4 * c * c  # their fusion
    place += c * 150

    pooled = 0
    for k in (1, 2, 3, 6):
        pooled += k * 4 * 6 * d  # the averages along y: from (4, 6) to (k, 6)
        pooled += k * 6 * k * d  # and along x: to (k, k)
        pooled += k * k * d * c  # 1x1
        pooled += 9 * k * k * c * c  # nine taps, each a product with a (c, c) matrix
        pooled += 3 * k * (6 * 3 * k * c)  # along x: (6, 3 k), for each of three rows of taps
        pooled += 3 * 4 * k * (6 * c)  # along y: (4, k), for each of them

    backbone = patches + 12 * layer
    head = 24 * place + pooled
    multiplications = backbone + head
    operations = speed.count_flops("deit_t16", "none", 64, 96)
    assert operations == 2 * multiplications


def test_neither_a_training_step_nor_a_prediction_waits_for_the_device_or_needs_float64_there():
    net = build_model("toy_p8", "ln_mln", 6)
    images, labels = random_batch(64, 64, 6)
    picture = formulas.picture(70, 95)

    with Watch() as training:
        loss, _ = net(images, labels)
        loss.backward()
    net.eval()
    with Watch() as prediction:
        evaluate.predict(net, picture, (0.5, 1.0), flip=True, short=64)
    with Watch() as windows:
        evaluate.predict(net, picture, short=64, slide=(48, 32))
    for seen in (training, prediction, windows):
        assert len(seen.operations) > 100
        assert not seen.waits
        assert not seen.doubles

    with Watch() as seen:  # what would be seen
        labelled = labels[labels != 255]
        doubles = labelled.double()
        doubles.to("meta").sum()
        labels.sum().item()
    assert seen.waits == ["index", "_to_copy", "_local_scalar_dense"]
    assert "sum" in seen.doubles


def test_nothing_but_pictures_comes_from_the_cpu(monkeypatch):
    """The device meta, which knows shapes and no numbers, stands for a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **how: nullcontext())  # it has none
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape))
    with torch.device("meta"):
        net = build_model("toy_p8", "ln_mln", 6)
        images = torch.zeros(2, 3, 64, 64)
        labels = torch.zeros(2, 64, 64).long()
        sizes = torch.zeros(2, 2)

    with Watch() as seen:
        x = ade20k.normalise(images, sizes)
        loss, _ = net(x, labels)
        loss.backward()
    assert "_to_copy" in seen.operations
    assert not seen.waits

    picture = formulas.picture(70, 95)
    net.eval()
    with Watch() as seen:
        evaluate.predict(net, picture, (0.5, 1.0, 1.5), flip=True, short=64)
    assert len(seen.operations) > 100
    assert not seen.waits  # (torch.tensor, the picture, is not seen)


cross_entropy = partial(upernet.cross_entropy, block_loss=upernet.summed_cross_entropy)


@pytest.mark.parametrize("size", [(11, 13), (3, 5), (4, 6)])
def test_loss_in_blocks_equals_the_whole_and_passes_gradcheck(size, monkeypatch):
    torch.manual_seed(0)
    logits = normal(3, 5, 4, 6).requires_grad_()
    labels = torch.randint(0, 5, (3, *size))
    labels[0, 0] = 255
    labels[1] = 255

    resized = bilinear(logits, size)
    losses = F.cross_entropy(resized, labels, ignore_index=255, reduction="none")
    whole = losses.mean()
    (want,) = torch.autograd.grad(whole, logits)

    for block in (1, 2**20):  # row by row, and all rows at once

        def rows_at_once(_, n, block=block):
            return max(1, block // n)

        monkeypatch.setattr(upernet, "rows_at_once", rows_at_once)
        loss = cross_entropy(logits, labels)
        (got,) = torch.autograd.grad(loss, logits)

        assert_exact(loss, whole)
        with torch.no_grad():
            assert torch.equal(cross_entropy(logits, labels), loss)
        assert_exact(got, want)
        assert torch.autograd.gradcheck(cross_entropy, (logits, labels))


def test_ignored_pixels_count_in_the_divisor():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.full((1, 2, 2), 255)
    labels[0, 0, 0] = 0

    loss = cross_entropy(logits, labels)
    want = np.log(4) / 4
    assert loss.item() == pytest.approx(want)


def test_compiles_without_a_graph_break_and_exports():
    torch.manual_seed(0)
    net = build_model("toy_p8", "ln_mln").eval()
    x = torch.randn(2, 3, 75, 130)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")

    with torch.no_grad():
        want = net(x)
        exported = torch.export.export(net, (x,))
        for form in (compiled, exported.module()):
            got = form(x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="resnet50.*vit_b16, deit_b16"):
        build_model("resnet50")
    with pytest.raises(ValueError, match="fpn.*none, ln, mln, ln_mln"):
        build_model("deit_s16", "fpn")


def test_timm_backbone_gives_the_features_of_the_references_own_converter(tmp_path, golden):
    gold = golden("backbone")
    weights = by_formula(gold)
    wrapped = {"model": tensors(weights)}  # as DeiT does it
    state_dict, facts = load(wrapped, tmp_path / "deit.pth")
    assert facts["arch"] == "deit_s16"
    assert facts["kind"] == "timm"
    assert facts["resolution"] == "224x224"
    left_out = [entry.split()[0] for entry in facts["left_out"]]
    assert left_out == ["head.bias", "head.weight"]
    positions = formulas.samples(state_dict["backbone.pos_embed"])
    np.testing.assert_allclose(positions, gold["pos_embed"], atol=1e-6)

    net = build_model("deit_s16", "ln").eval()
    load_into(net, state_dict, facts)
    image = formulas.image(300, 401)
    with torch.inference_mode():
        maps = net.backbone(torch.from_numpy(image))
    for features, want in zip(maps, gold["maps"], strict=True):
        got = formulas.samples(features)
        largest = np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=1e-4 * largest)

    # The same weights as the reference's converter names them are the same backbone.
    theirs = {}
    for name, value in to_mmseg(state_dict).items():
        theirs[name.removeprefix("backbone.")] = value
    assert set(theirs) == set(gold["keys"])

    again, facts = load(theirs, tmp_path / "mmseg_backbone.pth")
    assert facts["kind"] == "mmsegmentation backbone"
    assert_equal(again, state_dict)


def test_toy_model_loads_from_a_file_of_their_names(tmp_path):
    net = build_model("toy_p8", "mln", num_classes=7)
    path = write_mmseg(net.state_dict(), tmp_path / "x.pth")

    state_dict, facts = load_weights(path)
    assert facts["arch"] == "toy_p8"
    assert facts["neck"] == "mln"
    assert facts["num_classes"] == 7

    load_into(net, state_dict, facts)
    got = to_mmseg(net.state_dict())
    want = formulas.fill(got)
    assert_equal(got, tensors(want))


@pytest.mark.parametrize("neck", ["none", "ln", "mln", "ln_mln"])
@pytest.mark.parametrize("height, width", [(1, 1), (8, 200), (200, 8)])
def test_a_strip_one_patch_thick_passes_every_neck(neck, height, width):
    torch.manual_seed(0)
    net = build_model("toy_p8", neck, 5)
    images, labels = random_batch(height, width, 5)

    net.eval()
    logits = net(images)
    assert logits.shape == (2, 5, height, width)

    net.train()
    loss, _ = net(images, labels)
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_half_of_a_map_one_patch_thick_is_that_of_the_map_doubled():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1, 10)
    doubled = torch.cat([x, x], dim=2)

    got = upernet.halve(x)
    want = upernet.halve(doubled)
    torch.testing.assert_close(got, want)
