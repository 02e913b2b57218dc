"""The head: UPerNet turns four feature maps into C logits per pixel. Also here: the neck that gives
the maps their four sizes, the auxiliary head, the loss, and the whole model with build_model().

The whole model:
In:  images (B, 3, H, W) normalised float, and in training labels (B, H, W) int64 with 255 = "no
     label here".
Out: logits (B, C, H, W) without labels; (loss, parts) with labels.

The head:

    level 1 --1x1--------------------(+)--3x3--+
    level 2 --1x1------------(+)------^---3x3--+--> 3x3 over all four --dropout--1x1--> logits
    level 3 --1x1----(+)------^-----------3x3--+        (at the size of level 1)
    level 4 --PPM-----^-----------------------/

"^" upsamples a level, "(+)" adds it to the next finer one.

Paper: UPerNet (Xiao et al. 2018, arXiv:1807.10221): a feature pyramid (FPN, Lin et al. 2017,
arXiv:1612.03144) on top of the pyramid pooling of PSPNet (PPM, Zhao et al. 2017, arXiv:1612.01105).

Departures from the paper, all of them the reference's: dropout before the classifier, an auxiliary
head on level 4, and only one task, scene parsing.

Some steps have a fast form, which stands further down, in the part "Faster". Its docstring gives
the plain form, a line or two of code, and that is all one needs to read the model.

Names of dimensions: B batch, C classes, D channels before a convolution (at first the width of the
backbone), E channels after it (in the head of the recipes 512), h w the size of a map, H W the size
it is resized to.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import ARCHS, NECKS, Size, build_backbone, layout_of, same_size

IGNORE_INDEX = 255  # marks pixels without a label: no loss, no metric
AUX_WEIGHT = 0.4  # of the auxiliary head's loss (PSPNet, section 5.2)


# ---- The neck ------------------------------------------------------------------------------------


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, align_corners=False: (B, D, h, w) -> (B, D, *size). Returns x itself if that is its
    size already."""
    if same_size(x.shape[2:], size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def halve(x: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, D, h // 2, w // 2), at least 1 x 1.

    A scale factor instead of a size, as in the reference, keeps the samples exactly 2 pixels apart
    even when 7 pixels become 3. A map one pixel thick is doubled first, because half of it would be
    nothing."""
    h, w = x.shape[2:]
    at_least_2 = torch.sym_max(h, 2), torch.sym_max(w, 2)  # a max that torch.export can trace
    x = resize(x, at_least_2)
    return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


class MultiLevelNeck(nn.Module):
    """The neck that the recipes call MLN. The four maps of a ViT/16 all have stride 16. The neck
    gives them the strides 4, 8, 16 and 32 of the convolutional networks that UPerNet was made for.

    Each level gets a 1x1 convolution, a bilinear resize by 4, 2, 1 or 1/2, and a 3x3 convolution,
    without norm or activation. The neck adds no information, but it lets the head draw borders on a
    grid of 4 pixels instead of 16. Published for DeiT-S: one point of mIoU more, with 4.5 times the
    operations of the model without neck (here 3 times: see "Faster")."""

    scales = (4, 2, 1, 0.5)

    def __init__(self, width: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            nn.Conv2d(width, width, 1) for _ in self.scales
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in self.scales
        )
        for conv in (*self.lateral_convs, *self.convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """four (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h//2, w//2)"""
        out = []
        levels = zip(maps, self.scales, self.lateral_convs, self.convs)
        for x, scale, lateral, conv in levels:
            x = lateral(x)
            if scale > 1:
                x = conv3x3_of_upsampled(x, scale, conv)
            elif scale == 1:
                x = conv(x)
            else:
                x = conv(halve(x))
            out.append(x)
        return out


# ---- The heads -----------------------------------------------------------------------------------


class ConvBNReLU(nn.Module):
    """Convolution (no bias: BatchNorm has one) + BatchNorm + ReLU, from i channels to o."""

    def __init__(self, i: int, o: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False)
        self.bn = BatchNorm(o)  # nn.BatchNorm2d, over the pictures of all processes
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """(B, D, h, w) -> (B, E, h, w). If x is a list (for a 3x3 kernel), its maps are resized
        to the size of the first one and laid side by side. The list is empty afterwards."""
        if isinstance(x, list):
            x = conv3x3_of_resized(x, self.conv.weight)
        else:
            x = self.conv(x)
        return F.relu(self.bn(x), inplace=True)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1x1 convolution from features to logits. Its weights start near zero, so that at first all
    classes are about equally likely."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class UPerHead(nn.Module):
    """Four maps (B, D, h_i, w_i) -> logits (B, C, h_1, w_1). The maps have four sizes or, without
    the neck, one."""

    pool_sizes = (1, 2, 3, 6)

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.ppm = nn.ModuleList(
            ConvBNReLU(width, channels, 1) for _ in self.pool_sizes
        )
        side_by_side = width + len(self.ppm) * channels
        self.bottleneck = ConvBNReLU(side_by_side, channels, 3)

        self.lateral_convs = nn.ModuleList(
            ConvBNReLU(width, channels, 1) for _ in range(3)
        )
        self.fpn_convs = nn.ModuleList(
            ConvBNReLU(channels, channels, 3) for _ in range(3)
        )
        self.fpn_bottleneck = ConvBNReLU(4 * channels, channels, 3)

        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        # Pooling: averages over a 1x1, 2x2, 3x3 and 6x6 grid tell each place of the last map what
        # scene it is part of.
        top = maps[-1]  # (B, D, h_4, w_4)
        pyramid = [top]
        for conv, n in zip(self.ppm, self.pool_sizes):
            pooled = average_pool(top, n)  # (B, D, n, n)
            pyramid.append(conv(pooled))  # (B, E, n, n)
        scene = self.bottleneck(pyramid)  # (B, E, h_4, w_4)

        # Laterals: levels 1 to 3 get the number of channels that level 4 has now.
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps)]  # three (B, E, h_i, w_i)
        levels.append(scene)

        # Top-down: each level is told what the coarser one has understood.
        for i in (2, 1, 0):
            size = levels[i].shape[2:]
            levels[i] = levels[i] + resize(levels[i + 1], size)  # (B, E, h_i, w_i)

        # Smoothing: a 3x3 convolution for each level except the top, to which nothing was added.
        for i, conv in enumerate(self.fpn_convs):
            levels[i] = conv(levels[i])

        # Fusion: one 3x3 convolution over the four levels side by side, at the size of the finest.
        # It empties the list, which saves 120 MB for a picture of 512x683 at six scales.
        x = self.fpn_bottleneck(levels)  # (B, E, h_1, w_1)
        x = self.dropout(x)
        return self.classifier(x)  # (B, C, h_1, w_1)


class FCNHead(nn.Module):
    """The auxiliary head: a convolution and a classifier on level 4. It serves only training: its
    gradient reaches the backbone without passing through UPerHead (PSPNet, section 4: deep
    supervision).

    Four maps, of which it reads the last, (B, D, h_4, w_4) -> logits (B, C, h_4, w_4)"""

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.conv = ConvBNReLU(width, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.conv(maps[-1])  # (B, E, h_4, w_4)
        x = self.dropout(x)
        return self.classifier(x)  # (B, C, h_4, w_4)


# ---- The loss and the whole model ----------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, block_loss: Callable) -> Tensor:
    """Mean cross entropy of logits (B, C, h, w) against labels (B, H, W) int64. The plain form:

        losses = F.cross_entropy(resize(logits, labels.shape[1:]), labels, ignore_index=255,
                                 reduction="none")
        return losses.mean()

    The mean is over all pixels: ignored ones add no loss but count in the divisor, as in the
    reference. So a labelled pixel weighs the same, 1 / (B H W), however much of the batch is
    labelled. Also as in the reference, the loss is computed in float32 under autocast. (Float64
    stays float64.) The logits at the large size never exist all at once: see
    UpsampledCrossEntropy. block_loss: summed_cross_entropy, or its compiled form."""
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return UpsampledCrossEntropy.apply(logits.to(dtype), labels, block_loss)


class Segmenter(nn.Module):
    """Backbone, neck and heads. See build_model."""

    def __init__(self, arch: str, neck: str, num_classes: int):
        super().__init__()
        self.backbone = build_backbone(arch, neck)  # ValueError if a name is unknown
        arguments = ARCHS[arch]
        width = arguments["width"]
        channels = arguments["channels"]
        _, multi_level = NECKS[neck]
        self.neck = MultiLevelNeck(width) if multi_level else None
        self.decode_head = UPerHead(width, channels, num_classes)
        self.auxiliary_head = FCNHead(width, channels // 2, num_classes)
        self.block_loss = summed_cross_entropy  # with --compile a compiled one

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> the four maps (B, D, h_i, w_i) that both heads read."""
        maps = self.backbone(images)
        if self.neck is not None:
            maps = self.neck(maps)
        return maps

    def forward(self, images: Tensor, labels: Tensor | None = None):
        """images (B, 3, H, W) -> logits (B, C, H, W); with labels (B, H, W): (loss, {"decode": ...,
        "aux": ...}).

        loss is a scalar, the sum of the parts, in float32 (of a float64 model in float64). The
        parts are detached; "aux" is already multiplied by its weight of 0.4."""
        maps = self.features(images)
        logits = self.decode_head(maps)  # (B, C, h_1, w_1)
        if labels is None:
            return resize(logits, images.shape[2:])

        decode = cross_entropy(logits, labels, self.block_loss)
        aux_logits = self.auxiliary_head(maps)  # (B, C, h_4, w_4)
        aux = AUX_WEIGHT * cross_entropy(aux_logits, labels, self.block_loss)
        parts = {
            "decode": decode.detach(),
            "aux": aux.detach(),
        }
        return decode + aux, parts


def build_model(arch: str, neck: str = "none", num_classes: int = 150) -> Segmenter:
    """A randomly initialised model in training mode.

    arch: one of model.ARCHS. neck: none, ln (a LayerNorm after the last layer), mln (the
    multi-level neck), ln_mln. ValueError if one is unknown."""
    return Segmenter(arch, neck, num_classes)


# ---- Faster: resizing is two small matrices ------------------------------------------------------
#
# Bilinear resizing is linear, and acts along each axis by itself: resize(x) = My x Mx^T, where a
# row of M says which old pixels a new one is mixed from. Four pixels brought to eight:
#
#     old    |     0     |     1     |     2     |     3     |      M[0] = 1    0    0    0
#     new    |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |      M[1] = 3/4  1/4  0    0
#                     ^                                             M[2] = 1/4  3/4  0    0
#          the centre of new 1 lies a quarter of the way            ...
#          from the centre of old 0 to the centre of old 1
#
# Three things follow:
# - Neck and head convolve upsampled maps, 3x3. That is a sum of nine shifted maps, each times a
#   (D, E) matrix. The matrix acts on the channels, shifting and resizing act on y and x, so their
#   order does not matter. The product with the matrix comes first, on the small map
#   (add_upsampled_conv3x3).
# - Two resizings in a row are one, whose matrix is the product of both (evaluate.py).
# - The loss and the prediction want the logits at the picture's size, but read them pixel by pixel:
#   a few rows of My at a time are enough (UpsampledCrossEntropy, evaluate.py).


def resize_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The (new, old) matrix of bilinear resizing along one axis, align_corners=False.

    The centre of new pixel i lies at (i + 1/2) old / new - 1/2, counted in old pixels. It mixes the
    old pixels on either side, the nearer one more. Beyond the outermost centres there is only the
    edge pixel. Resizing a unit vector gives one column of the matrix, so resizing all of them gives
    the matrix. It has the device and the dtype of `like`."""
    unit = torch.eye(old, dtype=like.dtype, device=like.device)[None]  # (1, old, old)
    resized = F.interpolate(unit, size=new, mode="linear", align_corners=False)  # (1, old, new)
    return resized[0].T  # (new, old)


def conv3x3_of_resized(
    maps: list[Tensor],  # (B, D_i, h_i, w_i)
    weight: Tensor,  # (E, D, 3, 3): D is the sum of the D_i
) -> Tensor:
    """A 3x3 convolution over maps that are resized to the first one's size and laid side by side.
    -> (B, E, h, w), which is the first one's size. The plain form:

        size = maps[0].shape[2:]
        F.conv2d(torch.cat([resize(x, size) for x in maps], dim=1), weight, padding=1)

    A convolution is a sum over its input channels, so each map can be convolved by itself, a small
    one without resizing it first, and the results added. Each map is taken out of the list when its
    turn comes, so that its memory is free for the next.

    A map that has this size already is only convolved. On a GPU, small outputs take the plain form
    too: the fast one costs 40 launches a map, which take longer than what they compute."""
    size = maps[0].shape[2:]
    places = maps[0][:, 0].numel()  # B h w
    few = maps[0].is_cuda and places <= 2048
    layout = layout_of(maps[0])
    widths = [x.shape[1] for x in maps]
    first_weight, *other_weights = weight.split(widths, dim=1)  # (E, D_i, 3, 3)

    total = F.conv2d(maps.pop(0), first_weight, padding=1)  # (B, E, h, w)
    for map_weight in other_weights:
        x = maps.pop(0)
        if few or same_size(x.shape[2:], size):
            total = total + F.conv2d(resize(x, size), map_weight, padding=1)
        else:
            # The sum has to be channels last. The same name, so that the other copy is freed.
            total = total.contiguous(memory_format=torch.channels_last)
            total = add_upsampled_conv3x3(total, x, map_weight)
    return total.contiguous(memory_format=layout)


def conv3x3_of_upsampled(x: Tensor, scale: int, conv: nn.Conv2d) -> Tensor:
    """(B, D, h, w) -> (B, E, scale h, scale w). The plain form:

        conv(resize(x, (scale * h, scale * w)))

    The sum begins with the bias in every place, and the convolution is added to that."""
    B, _, h, w = x.shape
    bias = conv.bias.to(x.dtype)  # under autocast, x has another than the parameters
    bias = bias.expand(B, scale * h, scale * w, -1)  # (B, scale h, scale w, E)
    total = bias.contiguous().movedim(3, 1)  # (B, E, scale h, scale w), channels last in memory
    total = add_upsampled_conv3x3(total, x, conv.weight)
    return total.contiguous(memory_format=layout_of(x))


def add_upsampled_conv3x3(
    total: Tensor,  # (B, E, H, W), channels last in memory; without gradients it is written over
    x: Tensor,  # (B, D, h, w)
    weight: Tensor,  # (E, D, 3, 3)
) -> Tensor:
    """total plus a 3x3 convolution of x resized to (H, W). The plain form, which gives the same
    except for rounding:

        total + F.conv2d(resize(x, (H, W)), weight, padding=1)

    The convolution has nine taps: each shifts the map by -1, 0 or 1 along y and x, and multiplies
    it by a (D, E) matrix. The product comes first, on the small map (see "Faster" above). After 2x
    upsampling that takes 30% of the operations, after 8x 3%."""
    B, D, h, w = x.shape
    _, E, H, W = total.shape

    my = resize_matrix(h, H, x)  # (H, h)
    three_my = three_shifts(my)  # (3, H, h): one for each ky, the row of the 3x3 weight
    mx = resize_matrix(w, W, x)  # (W, w)
    three_mx = three_shifts(mx)  # (3, W, w): one for each kx, its column
    mx_by_tap = three_mx.movedim(0, 2)  # (W, w, 3)
    mx_by_tap = mx_by_tap.flatten(1)  # (W, w 3)
    weight = weight.permute(2, 1, 3, 0)  # (3, D, 3, E): for each ky from D to (kx, E)
    weight = weight.flatten(2)  # (3, D, 3 E)

    # The channels come last from here on, so that each product reads and writes whole rows.
    x = x.movedim(1, 3)  # (B, h, w, D)
    x = x.flatten(1, 2)  # (B, h w, D)
    x = x.contiguous()  # one copy, not one for each of the three products below
    total = total.movedim(1, 3)  # (B, H, W, E)
    total = total.flatten(2)  # (B, H, W E)

    # One ky at a time takes a third of the memory of all three at once. Where no gradients are
    # needed, it is added in place. With them, autograd would copy the map three times for each.
    for my_tap, weight_tap in zip(three_my, weight):  # (H, h) and (D, 3 E)
        part = x @ weight_tap  # (B, h w, 3 E), laid out as (B, h, w, kx, E)
        part = part.view(B, h, w * 3, E)  # (B, h, w 3, E): the order of mx_by_tap's columns
        part = mx_by_tap @ part  # (B, h, W, E): the three kx, added up
        part = part.flatten(2)  # (B, h, W E)

        my_tap = my_tap.expand(B, H, h)
        add = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
        total = add(total, my_tap, part)  # total + my_tap @ part

    total = total.unflatten(2, (W, E))  # (B, H, W, E)
    return total.movedim(3, 1)  # (B, E, H, W)


def three_shifts(matrix: Tensor) -> Tensor:
    """(n, old) -> (3, n, old): three matrices, whose row i is row i - 1, row i and row i + 1 of the
    given one. They are what the three taps of a convolution read along one axis. Rows beyond the
    edge are zeros, the convolution's padding."""
    padded = F.pad(matrix, (0, 0, 1, 1))  # (n + 2, old): a row of zeros at either end
    before = padded[:-2]
    after = padded[2:]
    return torch.stack([before, matrix, after])


def rows_at_once(device: torch.device, logits_per_row: int) -> int:
    """How many rows of logits the loss and the prediction take at a time. On a CPU: as many as fit
    into its cache (4 MB; four times as fast as all at once). On a GPU: far more, because a few
    large launches are faster than many small ones."""
    room = 2**26  # logits
    if device.type == "cpu":
        room = 2**20
    return max(1, room // logits_per_row)


def source_rows(start: int, stop: int, old: int, new: int) -> tuple:
    """Which of the old rows the new rows start..stop-1 are mixed from: first..end-1. So rows
    start..stop-1 of resize_matrix are zero outside columns first..end-1. -> (first, end)"""
    first = int((start + 0.5) * old / new - 0.5)  # above -1/2, so int never gives -1
    last = int((stop - 0.5) * old / new - 0.5)
    return first, min(last + 2, old)


class UpsampledCrossEntropy(torch.autograd.Function):
    """cross_entropy above, a few rows of pixels at a time, so that the logits at the picture's size
    never exist as a whole. They, their softmax and the gradients of both would be the largest
    tensors of a training step: 2.5 GB each for 16 x 150 x 512 x 512 floats.

    resize(logits) = My logits Mx^T. The product with Mx is taken for the whole (small) map, the one
    with My for a few of its rows at a time. Their transposes take the gradient back to the small
    map. That happens in forward already, while the rows exist; backward only scales the result."""

    @staticmethod
    def forward(ctx, logits, labels, block_loss):
        B, C, h, w = logits.shape
        _, H, W = labels.shape
        my = resize_matrix(h, H, logits)  # (H, h)
        mx = resize_matrix(w, W, logits)  # (W, w)

        wide = logits.movedim(1, 3)  # (B, h, w, C)
        wide = mx @ wide  # (B, h, W, C)
        wide = wide.flatten(2)  # (B, h, W C): the C logits of a pixel side by side
        wide_grad = torch.zeros_like(wide)

        total = 0
        step = rows_at_once(logits.device, B * W * C)
        for start in range(0, H, step):
            stop = min(start + step, H)
            first, end = source_rows(start, stop, h, H)
            rows = my[start:stop, first:end]  # (stop - start, end - first)
            large = rows @ wide[:, first:end]  # (B, stop - start, W C)
            large = large.unflatten(2, (W, C))  # (B, stop - start, W, C)

            large_labels = labels[:, start:stop]  # (B, stop - start, W)
            loss, large_grad = block_loss(large, large_labels)
            total += loss
            large_grad = large_grad.flatten(2)  # (B, stop - start, W C)
            wide_grad[:, first:end] += rows.mT @ large_grad  # (B, end - first, W C)

        wide_grad = wide_grad.unflatten(2, (W, C))  # (B, h, W, C)
        grad = mx.mT @ wide_grad  # (B, h, w, C)
        grad = grad.movedim(3, 1)  # (B, C, h, w)
        grad = grad / labels.numel()
        ctx.save_for_backward(grad)
        return total / labels.numel()

    @staticmethod
    def backward(ctx, grad):
        (logits_grad,) = ctx.saved_tensors
        return logits_grad * grad, None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> tuple:
    """logits (B, n, W, C) and labels (B, n, W) -> the sum of -log softmax(logits)[label] over the
    labelled pixels, and its gradient, softmax(logits) - one_hot(label), (B, n, W, C).

    Written by hand, because torch.compile cannot trace autograd.grad."""
    log_p = logits.log_softmax(3)  # (B, n, W, C)
    label = labels[..., None]  # (B, n, W, 1)
    kept = label != IGNORE_INDEX
    label = label.where(kept, 0)  # any class will do: ignored pixels are multiplied by 0

    of_label = log_p.gather(3, label)  # (B, n, W, 1)
    loss = -(of_label * kept).sum()

    grad = log_p.exp_()  # softmax(logits), in place
    minus_one = -torch.ones_like(of_label)
    grad.scatter_add_(3, label, minus_one)
    grad *= kept
    return loss, grad


def average_pool(x: Tensor, n: int) -> Tensor:
    """(B, D, h, w) -> (B, D, n, n): F.adaptive_avg_pool2d, or the same by two matrices.

    CPUs, where models are exported, take the matrices: ONNX has no such operation for maps of any
    size. On CUDA matrices cost 130 launches instead of 4, so they are taken only where sums need a
    fixed order (--deterministic): the gradient of the operation has none."""
    if x.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(x, n)

    h, w = x.shape[2:]
    along_y = pool_matrix(h, n, x)  # (n, h)
    along_x = pool_matrix(w, n, x)  # (n, w)
    pooled = along_y @ x @ along_x.mT
    return pooled.contiguous(memory_format=layout_of(x))


def pool_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The (new, old) matrix of adaptive average pooling along one axis: a new cell is the mean of
    all old pixels that it overlaps.

    Divide the axis into old * new steps. Then cell i reaches from step i * old to (i + 1) * old,
    and pixel k from step k * new to (k + 1) * new."""
    i = torch.arange(new, device=like.device)
    i = i[:, None]  # (new, 1)
    k = torch.arange(old, device=like.device)

    not_before = (k + 1) * new > i * old  # (new, old): pixel k ends after cell i begins
    not_after = k * new < (i + 1) * old  # it begins before the cell ends
    inside = not_before & not_after
    count = inside.sum(1, keepdim=True)  # (new, 1)
    return inside.to(like.dtype) / count


# ---- BatchNorm over several processes ------------------------------------------------------------


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, which in training takes mean and variance over the pictures of all processes.
    The published runs had 16 pictures on eight GPUs: mean and variance of one GPU's two would be
    noise. All processes have equally many pixels.

    (torch's SyncBatchNorm exists only for GPUs. It lets processes have different numbers of pixels,
    and waits for the device three times in each layer to find out.)"""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)"""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)

        with torch.no_grad():
            # Each process fills its own row of a table of zeros, so the sum holds all rows. (The
            # zeros after x only say that float32 is wanted.)
            world = dist.get_world_size()
            table = self.weight.new_zeros(world, 2, self.num_features)
            own = torch.batch_norm_update_stats(x, *torch.zeros_like(table[0]), 0.0)
            table[dist.get_rank()] = torch.stack(own)  # mean and variance of its pixels
            dist.all_reduce(table)

            # Over all: the mean variance inside a process, plus the variance of the means. (A mean
            # of squares minus the squared mean would lose digits: Chan et al. 1979.)
            mean, var = table.mean(0)  # each (D,)
            var += table[:, 0].var(0, correction=0)
            n = world * x[:, 0].numel()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            unbiased = var * n / (n - 1)
            self.running_var.lerp_(unbiased, self.momentum)
        return SynchronisedNorm.apply(x, self.weight, self.bias, mean, var)


class SynchronisedNorm(torch.autograd.Function):
    """y = weight * normed + bias, where normed = (x - mean) / sqrt(var + 1e-5). mean and var depend
    on x too, on that of all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var):
        ctx.save_for_backward(x, weight, mean, var)
        return F.batch_norm(x, mean, var, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        """Batch Normalization (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3), put together:
        weight / sqrt(var + 1e-5) * (grad - mean(grad) - normed * mean(grad * normed)), where both
        means are over the n pixels of all processes."""
        x, weight, mean, var = ctx.saved_tensors
        # With constant mean and var: the first term, the sums of grad * normed and of grad.
        first, *of_affine = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, 1e-5, [True] * 3
        )
        sums = torch.stack(of_affine)  # (2, D)
        dist.all_reduce(sums)
        world = dist.get_world_size()
        n = world * x[:, 0].numel()
        scale = weight * (var + 1e-5).rsqrt()  # (D,)
        a, b = sums / n * scale  # each (D,)
        rest = F.batch_norm(x, mean, var, a, b)  # normed * a + b
        return first - rest, *of_affine, None, None
