"""The head: UPerNet, which turns four feature maps into one label per pixel; the auxiliary head;
the loss; build_model.

In:  images (B, 3, H, W) normalised float, and in training labels (B, H, W) int64 with 255 = "no
label here". Out: logits (B, C, H, W) without labels; (loss, parts) with labels.

    level 1 --1x1--------------------(+)--3x3--+
    level 2 --1x1------------(+)------^---3x3--+--> concatenate --3x3--> dropout --1x1--> logits at level 1's size
    level 3 --1x1----(+)------^-----------3x3--+        ^
    level 4 --PPM-----^-----------------------/        (all at level 1's size)

Paper: UPerNet (Xiao et al. 2018, arXiv:1807.10221): a feature pyramid (FPN, Lin et al. 2017,
arXiv:1612.03144) on top of the pyramid pooling of PSPNet (Zhao et al. 2017, arXiv:1612.01105). "^"
is an upsampling that is added.

Departures from the paper, all of them the reference's: 512 channels throughout, dropout before the
classifier, an auxiliary head on level 4, and only the one task, scene parsing."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import ARCHS, build_backbone

IGNORE_INDEX = 255  # the label of pixels that nobody labelled: no loss, no metric
AUX_WEIGHT = 0.4  # of the auxiliary head's loss (PSPNet, section 3.3)
BLOCK = {
    "cpu": 2**20
}  # logits that exist at once in loss and inference: 4 MB stay in a cache; elsewhere 2 ** 26


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners=False: (B, C, h, w) -> (B, C, *size). Nothing to do (and nothing
    copied) at equal sizes."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ConvBNReLU(nn.Module):
    """Convolution (no bias: BatchNorm has one) + BatchNorm + ReLU, at the input's size. (B, i, h,
    w) -> (B, o, h, w)"""

    def __init__(self, i: int, o: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(o)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1x1 convolution from features to logits; starts near zero, so that training starts from
    "all classes alike"."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class UPerHead(nn.Module):
    """Four maps (B, width, h_i, w_i), of four sizes or all of one -> logits (B, C, h_1, w_1)."""

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        # PPM: averages over a 1x1, 2x2, 3x3 and 6x6 grid tell each place what scene it is part of.
        self.pool_sizes = (1, 2, 3, 6)
        self.ppm = nn.ModuleList(ConvBNReLU(width, channels, 1) for _ in self.pool_sizes)
        self.bottleneck = ConvBNReLU(width + len(self.pool_sizes) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBNReLU(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvBNReLU(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        top = maps[-1]  # (B, width, h_4, w_4)
        pooled = [
            resize(
                conv(F.adaptive_avg_pool2d(top, size)), top.shape[2:]
            )  # four of (B, channels, h_4, w_4)
            for conv, size in zip(self.ppm, self.pool_sizes)
        ]
        top = self.bottleneck(torch.cat([top, *pooled], dim=1))  # (B, channels, h_4, w_4)

        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps)] + [top]
        for i in (2, 1, 0):  # FPN: from coarse and wise to fine and naive
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        # The fusion is a 3x3 convolution over the four levels side by side. Taken as the sum of one
        # over each, it needs no copy of all four, and none of the levels that are in the sum
        # already: half the memory, same speed.
        size, fused = levels[0].shape[2:], 0
        for conv, weight in zip(
            (*self.fpn_convs, nn.Identity()), self.fpn_bottleneck.conv.weight.chunk(4, dim=1)
        ):
            x = conv(levels.pop(0))
            fused += F.conv2d(resize(x, size), weight, padding=1)  # (B, channels, h_1, w_1)
        x = F.relu(self.fpn_bottleneck.bn(fused), inplace=True)
        return self.classifier(self.dropout(x))


class FCNHead(nn.Module):
    """The auxiliary head, a classifier straight on level 4. Used in training only: it brings
    gradient to the backbone without passing the whole head (PSPNet, section 3.3). (B, width, h_4,
    w_4) -> (B, C, h_4, w_4)"""

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.conv = ConvBNReLU(width, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.conv(maps[-1])))


def interpolation_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old), two numbers a row: the product with it is `resize` along one axis. Of the dtype
    and device of `like`."""
    identity = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=new, mode="linear", align_corners=False)[
        0
    ].T.contiguous()


class UpsampledCrossEntropy(torch.autograd.Function):
    """cross_entropy below, a block of rows after the other, so that the logits at full size never
    exist as a whole.

    All at once they, their softmax and the gradients of both would be the largest tensors of the
    training step: 2.5 GB each for 16 x 150 x 512 x 512 floats. Blocks that stay in a cache are also
    4 times as fast on a CPU. Bilinear interpolation is one step along x, done for a whole (small)
    picture, and one along y, a product with a matrix M of two numbers a row, done by block. The
    gradient of the cross entropy is softmax - one_hot(label), so it is found on the way forward,
    while a block exists; the way back only scales it."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        (_, C, h, _), (H, W) = logits.shape, labels.shape[1:]
        M = interpolation_matrix(h, H, like=logits)
        step = max(1, BLOCK.get(logits.device.type, 2**26) // (C * W))  # rows of a block
        loss, grads = 0, []
        for x, y in zip(logits.split(1), labels):  # (1, C, h, w), (H, W)
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            with torch.enable_grad():  # the C logits of a pixel side by side
                wide = resize(x, (h, W)).permute(0, 2, 3, 1).reshape(h, W * C)
            grad = torch.zeros_like(wide)
            for start in range(0, H, step):
                stop = min(start + step, H)
                # The rows a..b of x that the matrix rows start..stop read.
                a, b = max(int((start + 0.5) * h / H - 0.5), 0), min(
                    int((stop - 0.5) * h / H - 0.5) + 2, h
                )
                m, label = M[start:stop, a:b], y[start:stop].reshape(-1, 1)
                log_p = (m @ wide.detach()[a:b]).view(-1, C).log_softmax(1)  # (rows * W, C)
                kept = label != IGNORE_INDEX
                label = label.where(kept, 0)
                loss = loss - log_p.gather(1, label)[kept].sum()
                p = log_p.exp_()
                p.scatter_add_(1, label, -torch.ones_like(p[:, :1]))  # softmax - one_hot
                grad[a:b] += m.T @ p.mul_(kept).view(stop - start, W * C)
            grads += torch.autograd.grad(wide, x, grad)
        ctx.save_for_backward(torch.cat(grads) / labels.numel())
        return loss / labels.numel()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad, None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, C, h, w) against labels (B, H, W) int64; logits are
    upsampled to (H, W) first.

    The mean is over *all* pixels: ignored ones add no loss but count in the divisor, as in the
    reference. A mean over the labelled ones alone would weigh pictures with large unlabelled parts
    more."""
    with torch.autocast(
        logits.device.type, enabled=False
    ):  # in float32 also under autocast, as there
        return UpsampledCrossEntropy.apply(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels
        )


class Segmenter(nn.Module):
    """Backbone, neck and heads. See build_model."""

    def __init__(self, arch: str, neck: str, num_classes: int):
        super().__init__()
        self.backbone, self.neck = build_backbone(arch, neck)  # refuses what it does not know
        a = ARCHS[arch]
        self.decode_head = UPerHead(a["width"], a["channels"], num_classes)
        self.auxiliary_head = FCNHead(a["width"], a["channels"] // 2, num_classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> the four maps that the heads see."""
        maps = self.backbone(images)
        return maps if self.neck is None else self.neck(maps)

    def forward(
        self, images: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) -> logits (B, C, H, W); with labels (B, H, W): (loss, {"decode": ...,
        "aux": ...}).

        loss is a float32 scalar, the sum of the parts; the parts are detached, "aux" carries its
        weight of 0.4."""
        maps = self.features(images)
        if labels is None:
            return resize(self.decode_head(maps), images.shape[2:])
        decode = cross_entropy(self.decode_head(maps), labels)
        aux = AUX_WEIGHT * cross_entropy(self.auxiliary_head(maps), labels)
        return decode + aux, {"decode": decode.detach(), "aux": aux.detach()}


def build_model(arch: str, neck: str = "none", num_classes: int = 150) -> Segmenter:
    """A randomly initialised model in training mode.

    arch: vit_b16, deit_b16, deit_s16, deit_t16 or toy_p8 (model.ARCHS). neck: none, ln (a LayerNorm
    after the last layer), mln (the multi-level neck), ln_mln. ValueError if one is unknown."""
    return Segmenter(arch, neck, num_classes)
