"""The backbone: a Vision Transformer that turns a picture into four feature maps, and the neck that
gives them four sizes.

In:  images (B, 3, H, W), float, normalised with ade20k.normalise. Out: four maps (B, D, h, w), h =
ceil(H / 16), w = ceil(W / 16), taken after each quarter of the layers.

    images -> patches -> tokens + positions -> 12 x [attention, MLP] -> 4 maps -> (neck) -> upernet.py

Papers: ViT (Dosovitskiy et al. 2021, arXiv:2010.11929), DeiT (Touvron et al. 2021,
arXiv:2012.12877). "The reference" in all six files is mmsegmentation 0.17.0, the code that produced
the published numbers.

Departures from the papers, all of them the reference's: no classifier and no dropout; patches may
hang over the right and lower edge (zero padding); positions are resized to any picture size;
intermediate maps are not normalised. Departures from today's mmsegmentation (1.x), which changed
the model: the patch projection keeps its bias and drop path acts on both branches. Departure from
the reference: it resizes pos_embed only if the *number* of tokens differs, so a 16x64 grid would
read the positions of a 32x32 one; here the grids are compared.

Names of dimensions: B batch, N tokens, D width, H W pixels, h w patches, C classes. Parameters
carry timm's names, so timm and DeiT files load as they are."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# depth is a multiple of 4: one feature map after every quarter. `grid` is the size of the pos_embed
# table in patches (512 / 16 = 32); `channels` is the width of the UPerNet head. drop_path is the
# rate of the last layer. ViT-B and DeiT-B are the same network: they differ in the pretrained
# weights and, in the released ViT-B + MLN recipe only, in drop path (0; the ViT-B recipe with LN
# sets 0.1 like all the DeiT ones).
ARCHS = {
    "vit_b16": dict(
        width=768,
        depth=12,
        heads=12,
        patch=16,
        grid=32,
        channels=512,
        drop_path=0.0,
        drop_path_ln=0.1,
    ),
    "deit_b16": dict(
        width=768,
        depth=12,
        heads=12,
        patch=16,
        grid=32,
        channels=512,
        drop_path=0.1,
        drop_path_ln=0.1,
    ),
    "deit_s16": dict(
        width=384,
        depth=12,
        heads=6,
        patch=16,
        grid=32,
        channels=512,
        drop_path=0.1,
        drop_path_ln=0.1,
    ),
    "deit_t16": dict(
        width=192,
        depth=12,
        heads=3,
        patch=16,
        grid=32,
        channels=512,
        drop_path=0.1,
        drop_path_ln=0.1,
    ),
    # A miniature for the toy data and the tests: the same code, small enough for a laptop's CPU.
    "toy_p8": dict(
        width=128, depth=4, heads=2, patch=8, grid=16, channels=64, drop_path=0.0, drop_path_ln=0.0
    ),
}
# What a neck's name means: (a LayerNorm after the last layer, the multi-level neck).
NECKS = {
    "none": (False, False),
    "ln": (True, False),
    "mln": (False, True),
    "ln_mln": (True, True),
}


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize position embeddings from a grid of old = (h, w) patches to new = (h, w), as the
    reference does.

    pos_embed: (1, 1 + old_h * old_w, D); the first is the class token's and stays as it is. -> (1,
    1 + new_h * new_w, D). torch's bicubic (a = -0.75), align_corners=False, no antialiasing (ViT,
    section 3.2: "2D interpolation")."""
    if old == new:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, old_h, old_w)
    patches = F.interpolate(
        patches, size=new, mode="bicubic", align_corners=False
    )  # (1, D, new_h, new_w)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbed(nn.Module):
    """Cut the picture into patches and map each to D numbers: a convolution whose stride is its
    size. ViT, eq. 1.

    A patch that hangs over the right or lower edge is filled with 0, the mean colour once pictures
    are normalised."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w)"""
        H, W = images.shape[2:]
        return self.proj(F.pad(images, (0, -W % self.patch, 0, -H % self.patch)))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v with d = D / heads. ViT, appendix A."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(
            B, N, 3, self.heads, D // self.heads
        )  # the 3 D outputs are q, k, v in this order
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        x = F.scaled_dot_product_attention(q, k, v)  # never holds the (N, N) weights of all heads
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU (the exact one, with erf) between them, four times as wide
    inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, leave a branch out for
    some of the pictures.

    The survivors are divided by the probability of surviving, so that the expected value stays the
    same."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = (
            torch.rand(x.shape[0], 1, 1, device=x.device) < keep
        )  # one draw a picture, not a token
        return x * (mask / keep).to(x.dtype)


class Block(nn.Module):
    """One pre-norm encoder layer (ViT, eq. 2 and 3): x + attention(norm(x)), then x + mlp(norm(x)).

    eps is 1e-6 as in JAX, not torch's 1e-5: the pretrained weights expect it."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """The backbone. (B, 3, H, W) -> four (B, D, h, w), after layers 3, 6, 9 and 12 of 12.

    final_norm ("LN" in the names of the recipes): one LayerNorm after the last layer, so it changes
    the last map alone."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        grid: int,
        drop_path: float,
        final_norm: bool,
    ):
        super().__init__()
        self.grid, self.every = (grid, grid), depth // 4
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        rates = [
            drop_path * i / (depth - 1) for i in range(depth)
        ]  # deeper layers are left out more often
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6) if final_norm else None
        # From scratch: timm's and the paper's initialisation. (The reference means to do the same,
        # but hands weights to helpers that expect modules and ignore them, so its untrained ViT
        # keeps torch's defaults. Recipes never notice: they all start from pretrained weights.)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make room for a table of positions of (h, w) patches: a model that was trained at another
        size keeps its own. The positions are to be loaded afterwards."""
        if grid != self.grid:
            self.grid = grid
            shape = (1, 1 + grid[0] * grid[1], self.pos_embed.shape[2])
            self.pos_embed = nn.Parameter(self.pos_embed.new_empty(shape))

    def forward(self, images: Tensor) -> list[Tensor]:
        # Tokens lie in memory as channels_last maps do; the convolutions after them get the order
        # that the images came in.
        layout = (torch.contiguous_format, torch.channels_last)[
            images.is_contiguous(memory_format=torch.channels_last)
        ]
        x = self.patch_embed(images)  # (B, D, h, w)
        B, D, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, h w, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1 + h w, D)
        x = x + resize_pos_embed(
            self.pos_embed, self.grid, (h, w)
        )  # eq. 1: positions are learned, and added
        maps = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i % self.every == 0:
                last = self.norm is not None and i == len(self.blocks)
                tokens = (self.norm(x) if last else x)[
                    :, 1:
                ]  # the class token has seen all, and is dropped
                maps.append(
                    tokens.transpose(1, 2).reshape(B, D, h, w).contiguous(memory_format=layout)
                )
        return maps


def build_backbone(arch: str, neck: str) -> VisionTransformer:
    """The backbone of an architecture in ARCHS, as the neck (one of NECKS) wants it: with a final norm
    or without. ValueError if one is unknown."""
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r} is unknown, choose one of {', '.join(ARCHS)}")
    if neck not in NECKS:
        raise ValueError(f"neck {neck!r} is unknown, choose one of {', '.join(NECKS)}")
    a = ARCHS[arch]
    final_norm, _ = NECKS[neck]
    drop_path = a["drop_path_ln"] if final_norm else a["drop_path"]
    return VisionTransformer(
        a["width"], a["depth"], a["heads"], a["patch"], a["grid"], drop_path, final_norm
    )
