"""The head: UPerNet turns four feature maps into one label per pixel. Also here: the neck that
gives the maps their four sizes, the auxiliary head, the loss, and build_model.

In:  images (B, 3, H, W) normalised float, and in training labels (B, H, W) int64 with 255 = "no
     label here".
Out: logits (B, C, H, W) without labels; (loss, parts) with labels.

    level 1 --1x1--------------------(+)--3x3--+
    level 2 --1x1------------(+)------^---3x3--+--> 3x3 over all four --dropout--1x1--> logits
    level 3 --1x1----(+)------^-----------3x3--+        (at the size of level 1)
    level 4 --PPM-----^-----------------------/

Paper: UPerNet (Xiao et al. 2018, arXiv:1807.10221): a feature pyramid (FPN, Lin et al. 2017,
arXiv:1612.03144) on top of the pyramid pooling of PSPNet (Zhao et al. 2017, arXiv:1612.01105). "^"
is an upsampling that is added.

Departures from the paper, all of them the reference's: dropout before the classifier, an auxiliary
head on level 4, and only the one task, scene parsing.

Names of dimensions: B batch, C channels (of logits: one for each class), O output channels, D the
width of the backbone, h w the size of a map, H W the larger size it is brought to.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import ARCHS, NECKS, build_backbone, same_size

IGNORE_INDEX = 255  # the label of pixels that nobody labelled: no loss, no metric
AUX_WEIGHT = 0.4  # of the auxiliary head's loss (PSPNet, section 5.2)


# ---- Resizing is two small matrices --------------------------------------------------------------
#
# Bilinear resizing is linear, and acts along each axis by itself: resize(x) = My x Mx^T, where a
# row of M says which old pixels a new one is mixed from. Four pixels brought to eight:
#
#     old    |     0     |     1     |     2     |     3     |      M[0] = 1    0    0    0
#     new    |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |      M[1] = 3/4  1/4  0    0
#                     ^                                             M[2] = 1/4  3/4  0    0
#          the centre of new 1 lies a quarter of the way            ...
#          from that of old 0 to that of old 1
#
# Three things follow:
# - Neck and head convolve upsampled maps, 3x3. That is a sum of nine shifted maps, each times a
#   (C, O) matrix. The matrix acts on channels, shifting and resizing on y and x, so the product can
#   come first, on the small map (conv3x3_of_resized).
# - Two resizings in a row are one, whose matrix is the product of both (evaluate.resized_rows).
# - The loss and the prediction want the logits at the picture's size, but read them pixel by pixel:
#   a few rows of My at a time will do (UpsampledCrossEntropy, evaluate.resized_rows).


def resize_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The (new, old) matrix of bilinear resizing along one axis, align_corners=False.

    New pixel i has its centre at x = (i + 1/2) old / new - 1/2 of the old pixels, and mixes the two
    on either side by how near they are; beyond the outermost centres it is the edge pixel alone. A
    matrix's columns are what it makes of the unit vectors: resizing these gives it. On the device
    of `like`, in its dtype."""
    unit = torch.eye(old, dtype=like.dtype, device=like.device)
    resized = F.interpolate(unit[None], size=new, mode="linear", align_corners=False)
    return resized[0].T  # from (old, new)


def source_rows(start: int, stop: int, old: int, new: int) -> tuple[int, int]:
    """-> (first, end): rows start to stop - 1 of resize_matrix are 0 but for its columns first to
    end - 1."""
    first_place = (start + 0.5) * old / new - 0.5
    last_place = (stop - 0.5) * old / new - 0.5
    first = int(first_place)  # it is above -1/2, and int rounds towards 0
    end = min(int(last_place) + 2, old)
    return first, end


def pool_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The (new, old) matrix of adaptive average pooling along one axis.

    New cell i averages the old pixels floor(i old / new) to ceil((i + 1) old / new) - 1. (Written
    out, as ONNX has no such pooling for maps of any size.)"""
    i = torch.arange(new, device=like.device)
    i = i[:, None]  # (new, 1)
    k = torch.arange(old, device=like.device)

    from_first = k >= i * old // new  # (new, old)
    before_end = k * new < (i + 1) * old
    inside = from_first & before_end
    count = inside.sum(1, keepdim=True)  # (new, 1)
    return inside.to(like.dtype) / count


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners=False: (B, C, h, w) -> (B, C, *size). The same x at equal sizes."""
    if same_size(x.shape[2:], size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def conv3x3_of_resized(maps: list[Tensor], weight: Tensor) -> Tensor:
    """A 3x3 convolution over maps that are brought to the size of the first one and laid side by
    side. The plain form:

        size = maps[0].shape[2:]
        F.conv2d(torch.cat([resize(x, size) for x in maps], dim=1), weight, padding=1)

    maps: (B, C_i, h_i, w_i), the C_i in sum C; weight (O, C, 3, 3); -> (B, O, h_1, w_1). A
    convolution is a sum over its input channels, so each map adds its own share, from its own size.
    The list is emptied on the way: what is in the sum need not be kept."""
    size = maps[0].shape[2:]
    widths = [x.shape[1] for x in maps]
    own, *shares = weight.split(widths, dim=1)

    total = F.conv2d(maps.pop(0), own, padding=1)  # (B, O, h_1, w_1)
    for share in shares:
        x = maps.pop(0)
        if same_size(x.shape[2:], size):
            total = total + F.conv2d(x, share, padding=1)
        else:
            # The layout that it adds in: made here, as the other one is let go here.
            total = total.contiguous(memory_format=torch.channels_last)
            total = add_upsampled_conv3x3(total, x, share)
    return total


def add_upsampled_conv3x3(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total (B, O, H, W) plus the convolution of x (B, C, h, w), brought to (H, W), with weight
    (O, C, 3, 3). total may be written over: it belongs to this function. Exact but for rounding.
    The plain form:

        total + F.conv2d(resize(x, (H, W)), weight, padding=1)

    Each of the nine taps is the map, shifted by a pixel or not along y and x, times a (C, O)
    matrix. The product comes first, on the small map (see above). After 2x upsampling that takes a
    third of the operations, after 8x 3%."""
    B, C, h, w = x.shape
    _, O, H, W = total.shape  # noqa: E741
    along_y = resize_matrix(h, H, x)  # My, (H, h)
    along_y = three_shifts(along_y)  # (3, H, h)
    along_x = resize_matrix(w, W, x)  # Mx, (W, w)
    along_x = three_shifts(along_x)  # (3, W, w)
    along_x = along_x.permute(1, 2, 0)  # (W, w, 3)
    along_x = along_x.flatten(1)  # (W, w 3)
    weight = weight.permute(2, 1, 3, 0)  # (3, C, 3, O): for each ky from C to (kx, O)
    weight = weight.flatten(2)  # (3, C, 3 O)

    # The channels come last from here on, so that each product reads and writes whole rows.
    x = x.permute(0, 2, 3, 1)  # (B, h, w, C)
    x = x.flatten(1, 2)  # (B, h w, C)
    total = total.permute(0, 2, 3, 1)  # (B, H, W, O)
    total = total.flatten(2)  # (B, H, W O)

    # The three ky one after the other, added in place: a third of the memory.
    for shifted, of_row in zip(along_y, weight):  # (H, h) and (C, 3 O)
        part = x @ of_row  # (B, h w, 3 O), laid out as (B, h, w, kx, O)
        part = part.view(B, h, w * 3, O)
        part = along_x @ part  # (B, h, W, O): the three kx, added up
        part = part.flatten(2)  # (B, h, W O)
        shifted = shifted.to(part.dtype)  # autocast casts nothing for what works in place
        shifted = shifted.expand(B, H, h)
        total = total.baddbmm_(shifted, part)  # total + shifted @ part

    total = total.unflatten(2, (W, O))
    return total.permute(0, 3, 1, 2)


def three_shifts(matrix: Tensor) -> Tensor:
    """(n, old) -> (3, n, old): the matrix whose row i is the one before i, the one at i, the one
    after it, for the three taps of a convolution along one axis. Beyond the edge lie zeros."""
    n = matrix.shape[0]
    edges = (0, 0, 1, 1)  # no column, and a row of zeros at either end
    padded = F.pad(matrix, edges)  # (n + 2, old)
    before = padded[:n]
    after = padded[2:]
    return torch.stack([before, matrix, after])


# ---- The neck ------------------------------------------------------------------------------------


class MultiLevelNeck(nn.Module):
    """The neck that the recipes call MLN: gives the four maps of a ViT, all at stride 16, the
    strides 4, 8, 16 and 32 of the convolutional networks that UPerNet was made for.

    Per level a 1x1 convolution, a bilinear resize by 4, 2, 1 or 1/2, and a 3x3 convolution; no
    norm, no activation. It adds no information, but it lets the head draw its borders on a grid of
    4 pixels instead of 16: published, one point of mIoU for DeiT-S, at three times the operations.
    """

    scales = (4, 2, 1, 0.5)

    def __init__(self, width: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList()
        self.convs = nn.ModuleList()
        for _ in self.scales:
            lateral = nn.Conv2d(width, width, 1)
            conv = nn.Conv2d(width, width, 3, padding=1)
            self.lateral_convs.append(lateral)
            self.convs.append(conv)

        for conv in (*self.lateral_convs, *self.convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """four (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w) and (B, D, h//2, w//2),
        which is at least 1 x 1"""
        out = []
        levels = zip(maps, self.scales, self.lateral_convs, self.convs)
        for x, scale, lateral, conv in levels:
            x = lateral(x)
            if scale > 1:
                x = self.conv_of_upsampled(x, scale, conv)
            elif scale == 1:
                x = conv(x)
            else:
                x = self.downsampled(x, scale)
                x = conv(x)
            out.append(x)
        return out

    @staticmethod
    def conv_of_upsampled(x: Tensor, scale: int, conv: nn.Conv2d) -> Tensor:
        """conv(resize(x, by scale)): its bias everywhere, and the rest added to that."""
        B, D, h, w = x.shape
        size = (scale * h, scale * w)
        bias = conv.bias.to(x.dtype)
        bias = bias[:, None, None]  # (D, 1, 1)
        bias = bias.expand(B, D, *size)
        bias = bias.contiguous(memory_format=torch.channels_last)
        return add_upsampled_conv3x3(bias, x, conv.weight)

    @staticmethod
    def downsampled(x: Tensor, scale: float) -> Tensor:
        """Resize by the factor: the samples lie 2 pixels apart also where 7 become 3 (not 7/3)."""
        h, w = x.shape[2:]
        if h == 1 or w == 1:  # a strip one patch thick, of which half would be nothing
            enough = (max(h, 2), max(w, 2))
            x = resize(x, enough)
        return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


# ---- The heads -----------------------------------------------------------------------------------


class ConvBNReLU(nn.Module):
    """Convolution (no bias: BatchNorm has one) + BatchNorm + ReLU. (B, i, h, w) -> (B, o, h, w)"""

    def __init__(self, i: int, o: int, kernel: int):
        super().__init__()
        same = kernel // 2  # this padding keeps the size
        self.conv = nn.Conv2d(i, o, kernel, padding=same, bias=False)
        self.bn = nn.BatchNorm2d(o)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)

    def of_resized(self, maps: list[Tensor]) -> Tensor:
        """The same of maps that are resized to the first one's size and laid side by side; empties
        the list."""
        x = conv3x3_of_resized(maps, self.conv.weight)
        x = self.bn(x)
        return F.relu(x, inplace=True)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1x1 convolution from features to logits. Its weights start near zero, so that training
    starts from "all classes alike"."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class UPerHead(nn.Module):
    """Four maps (B, width, h_i, w_i), of four sizes or all of one -> logits (B, C, h_1, w_1)."""

    pool_sizes = (1, 2, 3, 6)

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.ppm = nn.ModuleList()
        for _ in self.pool_sizes:
            self.ppm.append(ConvBNReLU(width, channels, 1))
        side_by_side = width + len(self.ppm) * channels
        self.bottleneck = ConvBNReLU(side_by_side, channels, 3)

        self.lateral_convs = nn.ModuleList()
        for _ in range(3):
            self.lateral_convs.append(ConvBNReLU(width, channels, 1))
        self.fpn_convs = nn.ModuleList()
        for _ in range(3):
            self.fpn_convs.append(ConvBNReLU(channels, channels, 3))
        self.fpn_bottleneck = ConvBNReLU(4 * channels, channels, 3)

        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        # Pooling: averages over a 1x1, 2x2, 3x3 and 6x6 grid tell each place of the last map what
        # scene it is part of.
        top = maps[-1]  # (B, width, h_4, w_4)
        h, w = top.shape[2:]
        pyramid = [top]
        for conv, n in zip(self.ppm, self.pool_sizes):
            along_y = pool_matrix(h, n, top)  # (n, h)
            along_x = pool_matrix(w, n, top)  # (n, w)
            pooled = along_y @ top  # (B, width, n, w)
            pooled = pooled @ along_x.mT  # (B, width, n, n)
            pyramid.append(conv(pooled))
        scene = self.bottleneck.of_resized(pyramid)  # (B, channels, h_4, w_4)

        # Laterals: levels 1 to 3 get the number of channels that level 4 has now.
        levels = []
        for conv, x in zip(self.lateral_convs, maps[:3]):
            levels.append(conv(x))  # (B, channels, h_i, w_i)
        levels.append(scene)

        # Top-down: each level is told what the coarser one has understood.
        for i in (2, 1, 0):
            size = levels[i].shape[2:]
            levels[i] = levels[i] + resize(levels[i + 1], size)

        # Smoothing: a 3x3 convolution for each level but the top, against what upsampling leaves.
        for i, conv in enumerate(self.fpn_convs):
            levels[i] = conv(levels[i])

        # Fusion: one 3x3 convolution over the four levels side by side, at the size of the finest.
        x = self.fpn_bottleneck.of_resized(levels)  # (B, channels, h_1, w_1)
        x = self.dropout(x)
        return self.classifier(x)  # (B, C, h_1, w_1)


class FCNHead(nn.Module):
    """The auxiliary head, a convolution and a classifier on level 4 alone. It serves training: it
    brings gradient to the backbone past the whole other head (PSPNet, section 4: deep supervision).

    Four maps, of which it reads the last (B, width, h_4, w_4) -> logits (B, C, h_4, w_4)."""

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.conv = ConvBNReLU(width, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        top = maps[-1]  # (B, width, h_4, w_4)
        x = self.conv(top)  # (B, channels, h_4, w_4)
        x = self.dropout(x)
        return self.classifier(x)  # (B, C, h_4, w_4)


# ---- The loss ------------------------------------------------------------------------------------


def rows_at_once(device: torch.device, numbers: int) -> int:
    """How many rows of `numbers` logits each the loss and the prediction take at a time: on a CPU
    what stays in its cache (4 MB; four times as fast as all at once), on a GPU large launches."""
    block = 2**26
    if device.type == "cpu":
        block = 2**20
    return max(1, block // numbers)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, C, h, w) against labels (B, H, W) int64. The plain form:

        losses = F.cross_entropy(resize(logits, labels.shape[1:]), labels, ignore_index=255,
                                 reduction="none")
        return losses.mean()

    The mean is over all pixels: ignored ones add no loss but count in the divisor, as in the
    reference. So a labelled pixel weighs the same, 1 / (B H W), however much of the batch is
    labelled."""
    with torch.autocast(logits.device.type, enabled=False):  # as the reference
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(dtype)
        return UpsampledCrossEntropy.apply(logits, labels)


class UpsampledCrossEntropy(torch.autograd.Function):
    """cross_entropy above, some rows of pixels after the other, so that the logits at the picture's
    size never exist as a whole. They, their softmax and the gradients of both would be the largest
    tensors of a training step: 2.5 GB each for 16 x 150 x 512 x 512 floats.

    resize(x) = My x Mx^T: the product along x is taken for the whole (small) map, the one along y
    for some rows of My at a time. The gradient of the cross entropy is softmax - one_hot(label), so
    it is found on the way forward, while the rows exist; the way back only scales it."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        B, C, h, w = logits.shape
        _, H, W = labels.shape
        along_y = resize_matrix(h, H, logits)  # My, (H, h)
        along_x = resize_matrix(w, W, logits)  # Mx, (W, w)

        wide = logits.permute(0, 2, 3, 1)  # (B, h, w, C)
        wide = along_x @ wide  # (B, h, W, C)
        wide = wide.flatten(2)  # (B, h, W C): the C logits of a pixel side by side
        with_grad = ctx.needs_input_grad[0]
        wide_grad = None
        if with_grad:
            wide_grad = torch.zeros_like(wide)

        total = logits.new_zeros(())
        numbers = B * W * C  # of a row of pixels
        step = rows_at_once(logits.device, numbers)
        for start in range(0, H, step):
            stop = min(start + step, H)
            first, end = source_rows(start, stop, h, H)
            m = along_y[start:stop, first:end]
            large = m @ wide[:, first:end]  # (B, stop - start, W C)
            large = large.unflatten(2, (W, C))

            some = labels[:, start:stop]  # (B, stop - start, W)
            loss, large_grad = summed_cross_entropy(large, some, with_grad)
            total += loss
            if with_grad:
                large_grad = large_grad.flatten(2)  # (B, stop - start, W C)
                wide_grad[:, first:end] += m.mT @ large_grad

        count = labels.numel()
        if with_grad:
            wide_grad = wide_grad.unflatten(2, (W, C))
            grad = along_x.mT @ wide_grad  # (B, h, w, C)
            grad = grad.permute(0, 3, 1, 2)
            ctx.save_for_backward(grad / count)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad, None


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """logits (B, n, W, C) and labels (B, n, W) -> the sum of -log softmax(logits)[label] over the
    labelled pixels, and its gradient, softmax(logits) - one_hot(label), (B, n, W, C)."""
    log_p = logits.log_softmax(3)
    label = labels[..., None]  # (B, n, W, 1)
    kept = label != IGNORE_INDEX
    label = label.where(kept, 0)  # of an ignored pixel any class will do: it counts nothing

    of_label = log_p.gather(3, label)  # (B, n, W, 1)
    loss = -(of_label * kept).sum()
    if not with_grad:
        return loss, None

    grad = log_p.exp_()
    minus_one = -torch.ones_like(of_label)
    grad.scatter_add_(3, label, minus_one)
    grad *= kept
    return loss, grad


# ---- The whole model -----------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Backbone, neck and heads. See build_model."""

    def __init__(self, arch: str, neck: str, num_classes: int):
        super().__init__()
        self.backbone = build_backbone(arch, neck)  # refuses what it does not know
        width = ARCHS[arch]["width"]
        channels = ARCHS[arch]["channels"]
        _, multi_level = NECKS[neck]
        self.neck = MultiLevelNeck(width) if multi_level else None
        self.decode_head = UPerHead(width, channels, num_classes)
        half = channels // 2
        self.auxiliary_head = FCNHead(width, half, num_classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> the four maps that the heads see."""
        maps = self.backbone(images)
        if self.neck is not None:
            maps = self.neck(maps)
        return maps

    def forward(
        self, images: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) -> logits (B, C, H, W); with labels (B, H, W): (loss, {"decode": ...,
        "aux": ...}).

        loss is a float32 scalar, the sum of the parts; the parts are detached, "aux" carries its
        weight of 0.4."""
        maps = self.features(images)
        logits = self.decode_head(maps)  # (B, C, h_1, w_1)
        if labels is None:
            return resize(logits, images.shape[2:])

        decode = cross_entropy(logits, labels)
        aux_logits = self.auxiliary_head(maps)  # (B, C, h_4, w_4)
        aux = AUX_WEIGHT * cross_entropy(aux_logits, labels)
        parts = {"decode": decode.detach(), "aux": aux.detach()}
        return decode + aux, parts


def build_model(arch: str, neck: str = "none", num_classes: int = 150) -> Segmenter:
    """A randomly initialised model in training mode.

    arch: one of model.ARCHS. neck: none, ln (a LayerNorm after the last layer), mln (the
    multi-level neck), ln_mln. ValueError if one is unknown."""
    return Segmenter(arch, neck, num_classes)
