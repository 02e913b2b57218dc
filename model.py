"""The backbone: a Vision Transformer that turns a picture into four feature maps.

In:  images (B, 3, H, W), float, normalised with ade20k.normalise.
Out: four maps (B, D, h, w), one after each quarter of the layers; h = ceil(H / patch), w likewise.

    images -> patches -> tokens + positions -> 12 x [attention, MLP] -> maps -> (neck) -> upernet.py

Papers: ViT (Dosovitskiy et al. 2021, arXiv:2010.11929), DeiT (Touvron et al. 2021,
arXiv:2012.12877). "The reference" in all six files is mmsegmentation 0.17.0, the code that produced
the published numbers.

Why four maps and not the last alone: a label per pixel needs to know what is there and where it
ends. The layers of a ViT have one resolution but not one view: early ones mix mostly what lies
close together, late ones the whole picture (ViT, section 4.5, measures how far attention reaches),
so the early maps still hold the edges that the late ones have traded for meaning. UPerNet's head
was made for such a series, from fine to coarse.

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

# width is D; depth is a multiple of 4, for one map after every quarter; heads divides width. patch
# is the side of a patch in pixels, grid that of the pos_embed table in patches (512 / 16 = 32),
# channels the width of the UPerNet head, drop_path the rate of the last layer, drop_path_ln the
# same for necks with "ln". ViT-B and DeiT-B are one network: they differ in their pretrained
# weights and in drop path (the released ViT-B has none, but for its recipe with LN).
#
# vit_b16, deit_b16 and deit_s16 have published recipes, the others none. layer_scale: see
# LayerScale. registers: so many tokens that belong to no patch. cls_position=False: the class token
# has no position of its own in their files; here it has one, of zeros, which adds nothing.
COMMON = dict(depth=12, patch=16, grid=32, channels=512, drop_path=0.1, drop_path_ln=0.1)
DEIT_3 = dict(COMMON, layer_scale=True, cls_position=False)
DINO_2 = dict(COMMON, layer_scale=True, patch=14, grid=37)  # 37 patches of 14: pictures of 518
REGISTERS = dict(DINO_2, registers=4, cls_position=False)
ARCHS = {
    "vit_b16":  dict(COMMON, width=768, heads=12, drop_path=0.0),
    "deit_b16": dict(COMMON, width=768, heads=12),
    "deit_s16": dict(COMMON, width=384, heads=6),
    "deit_t16": dict(COMMON, width=192, heads=3),
    # A miniature for the toy data and the tests: the same code, small enough for a laptop's CPU.
    "toy_p8":   dict(depth=4, patch=8, grid=16, channels=64,
                     width=128, heads=2, drop_path=0.0, drop_path_ln=0.0),
    # ---- ViT-L, DeiT-III (arXiv:2204.07118), DINOv2 (arXiv:2304.07193), it with registers
    "vit_l16":        dict(COMMON, width=1024, heads=16, depth=24),
    "deit3_s16":      dict(DEIT_3, width=384, heads=6),
    "deit3_b16":      dict(DEIT_3, width=768, heads=12),
    "deit3_l16":      dict(DEIT_3, width=1024, heads=16, depth=24),
    "dinov2_s14":     dict(DINO_2, width=384, heads=6),
    "dinov2_b14":     dict(DINO_2, width=768, heads=12),
    "dinov2_l14":     dict(DINO_2, width=1024, heads=16, depth=24),
    "dinov2_s14_reg": dict(REGISTERS, width=384, heads=6),
    "dinov2_b14_reg": dict(REGISTERS, width=768, heads=12),
    "dinov2_l14_reg": dict(REGISTERS, width=1024, heads=16, depth=24),
}

# What a neck's name means: (a LayerNorm after the backbone's last layer, the multi-level neck). The
# recipes name both behind the architecture, so one option chooses them.
NECKS = {
    "none":   (False, False),
    "ln":     (True, False),
    "mln":    (False, True),
    "ln_mln": (True, True),
}


def same_size(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (h, w) are equal. While torch.export traces the model for pictures of any
    size: whether they are for all of them, as the traced steps are to fit all."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(a == b) for a, b in zip(one, other))
    return tuple(one) == tuple(other)


def resize_pos_embed(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic"
) -> Tensor:
    """Resize position embeddings from a grid of old = (h, w) patches to new = (h, w).

    pos_embed: (1, 1 + old_h * old_w, D); the first is the class token's and stays as it is.
    -> (1, 1 + new_h * new_w, D). As the reference does it: torch's bicubic (a = -0.75),
    align_corners=False, no antialiasing (ViT, section 3.2: "2D interpolation"). mode="bilinear" is
    Google's own way, which lays the corner patches on each other."""
    if same_size(old, new):
        return pos_embed

    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, old_h, old_w)
    corners = mode == "bilinear"
    patches = F.interpolate(patches, size=new, mode=mode, align_corners=corners)  # (1, D, *new)
    patches = patches.flatten(2).transpose(1, 2)  # (1, new_h * new_w, D)
    return torch.cat([cls, patches], dim=1)


class PatchEmbed(nn.Module):
    """Cut the picture into patches and map each to D numbers (ViT, eq. 1): a convolution whose
    stride is its size.

    A patch that hangs over the right or lower edge is filled with 0, the mean colour once pictures
    are normalised."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w)"""
        most = self.patch - 1  # may be missing; what does not fill a patch, the convolution drops
        images = F.pad(images, (0, most, 0, most))
        return self.proj(images)


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
        qkv = self.qkv(x)  # (B, N, 3 D): q, k and v, in this order
        qkv = qkv.reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)

        # softmax(q @ k^T / sqrt(d)) @ v, without ever holding the (N, N) weights of all heads.
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them, with a GELU (the exact one, with erf).
    (B, N, D) -> (B, N, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, leave a branch out for
    some of the pictures. (B, N, D) -> (B, N, D)

    The survivors are divided by the probability of surviving, so that the expected value stays the
    same."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x

        keep = 1 - self.rate
        draws = torch.rand(x.shape[0], 1, 1, device=x.device)  # one a picture, not one a token
        return x * ((draws < keep) / keep).to(x.dtype)


class LayerScale(nn.Module):
    """One learned factor for each channel of a branch, near 0 at first, so that deep networks start
    as shallow ones (Touvron et al. 2021, arXiv:2103.17239). (B, N, D) -> (B, N, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm encoder layer (ViT, eq. 2 and 3): x + attention(norm(x)), then x + mlp(norm(x)).

    The norms stand inside the branches, so that the sum x runs through all layers untouched. Their
    eps is 1e-6 as in JAX, not torch's 1e-5: the pretrained weights expect it."""

    def __init__(self, width: int, heads: int, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()

        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        branch = self.ls1(self.attn(self.norm1(x)))
        x = x + self.drop_path(branch)

        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + self.drop_path(branch)


class VisionTransformer(nn.Module):
    """The backbone. (B, 3, H, W) -> four (B, D, h, w), after layers 3, 6, 9 and 12 of 12.

    The class token, which the pretraining read its answer from, has no use here. It goes through
    all layers nevertheless: the pretrained patches attend to it in each of them, and would compute
    something else without it. It is dropped from the maps, as it lies nowhere in the picture.

    final_norm ("LN" in the names of the recipes): one LayerNorm after the last layer, so it changes
    the last map alone. registers: so many more learned tokens go through all layers. The network
    uses them as scratch space, which it else takes from patches of plain background (Darcet et al.
    2023, arXiv:2309.16588)."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        grid: int,
        drop_path: float,
        final_norm: bool,
        layer_scale: bool = False,
        registers: int = 0,
    ):
        super().__init__()
        self.grid = (grid, grid)
        self.every = depth // 4  # layers to a map
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.extra = 1 + registers  # tokens that lie nowhere in the picture

        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.set_drop_path(drop_path)
        self.norm = nn.LayerNorm(width, eps=1e-6) if final_norm else None

        # From scratch: timm's initialisation. (The reference means to do the same,
        # but hands weights to helpers that expect modules and ignore them, so its untrained ViT
        # keeps torch's defaults. Recipes never notice: they all start from pretrained weights.)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.trunc_normal_(self.reg_token, std=0.02)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_drop_path(self, rate: float) -> None:
        """The last layer's rate. Deeper layers are left out more often: the early ones are what all
        others build on."""
        for i, block in enumerate(self.blocks):
            block.drop_path.rate = rate * i / (len(self.blocks) - 1)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make room for a table of positions of (h, w) patches: a model that was trained at another
        size keeps its own. The positions are to be loaded afterwards."""
        if grid != self.grid:
            self.grid = grid
            shape = (1, 1 + grid[0] * grid[1], self.pos_embed.shape[2])
            self.pos_embed = nn.Parameter(self.pos_embed.new_empty(shape))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four (B, D, h, w)"""
        # The maps get the memory format of the images, which flatten and transpose lose.
        layout = torch.contiguous_format
        if images.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last

        x = self.patch_embed(images)  # (B, D, h, w)
        B, D, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, h w, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1 + h w, D)
        x = x + resize_pos_embed(self.pos_embed, self.grid, (h, w))  # learned, and added (eq. 1)
        if self.reg_token is not None:
            x = torch.cat([x[:, :1], self.reg_token.expand(B, -1, -1), x[:, 1:]], dim=1)

        maps = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)  # (B, extra + h w, D)
            if i % self.every != 0:
                continue

            last = i == len(self.blocks)
            tokens = self.norm(x) if last and self.norm is not None else x
            patches = tokens[:, self.extra :].transpose(1, 2)  # (B, D, h w)
            patches = patches.reshape(B, D, h, w)
            maps.append(patches.contiguous(memory_format=layout))
        return maps


def build_backbone(arch: str, neck: str) -> VisionTransformer:
    """The backbone of an architecture in ARCHS, as the neck (one of NECKS) wants it: with a final
    norm or without. ValueError if one is unknown."""
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r} is unknown, choose one of {', '.join(ARCHS)}")
    if neck not in NECKS:
        raise ValueError(f"neck {neck!r} is unknown, choose one of {', '.join(NECKS)}")

    a = ARCHS[arch]
    final_norm, _ = NECKS[neck]
    return VisionTransformer(
        width=a["width"],
        depth=a["depth"],
        heads=a["heads"],
        patch=a["patch"],
        grid=a["grid"],
        drop_path=a["drop_path_ln"] if final_norm else a["drop_path"],
        final_norm=final_norm,
        layer_scale=a.get("layer_scale", False),
        registers=a.get("registers", 0),
    )
