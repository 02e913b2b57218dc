"""The backbone: a Vision Transformer that turns a picture into four feature maps.

In:  images (B, 3, H, W), float, normalised with ade20k.normalise.
Out: four maps (B, D, h, w), one after each quarter of the layers; h = ceil(H / patch), w likewise.

    images -> patches -> tokens + positions -> 12 x [attention, MLP] -> four maps -> upernet.py

Papers: ViT (Dosovitskiy et al. 2021, arXiv:2010.11929), DeiT (Touvron et al. 2021,
arXiv:2012.12877). "The reference" in all six files is mmsegmentation 0.17.0, the code that produced
the published numbers. Where the reference departs from the papers, this file follows the reference
and says so.

Why four maps and not only the last: to label each pixel, the head must know what is there and also
where it ends. All layers of a ViT have the same resolution, but they know different things. Early
layers mix mostly what lies close together, late ones the whole picture (ViT, section 4.5, measures
how far attention reaches). So the early maps still hold the edges that the late ones have traded
for meaning. UPerNet's head was made to combine such a series of maps.

Names of dimensions: B batch, N tokens, D width, H W pixels, h w patches. Parameters have timm's
names, so the weights of timm and DeiT load without renaming."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # (h, w): of a picture in pixels, of a map in patches


class PatchEmbed(nn.Module):
    """Cut the picture into patches and map each to D numbers (ViT, eq. 1): a convolution whose
    kernel and stride are both one patch.

    A patch that hangs over the right or lower edge is completed with 0, which is the mean colour
    once pictures are normalised. (The reference does this. In the papers no patch hangs over.)"""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.patch = patch
        # (Later mmsegmentation, 1.2, dropped the bias. The published weights have one.)
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w)"""
        # patch - 1 zeros complete any patch that hangs over. Zeros beyond that are too few for
        # another patch, so the convolution ignores them.
        zeros = self.patch - 1
        images = F.pad(images, (0, zeros, 0, zeros))
        return self.proj(images)


def resize_pos_embed(pos_embed: Tensor, old: Size, new: Size) -> Tensor:
    """Resize position embeddings from a grid of old = (h, w) patches to new = (h, w).

    pos_embed: (1, 1 + old_h * old_w, D); the first is the class token's and stays as it is.
    -> (1, 1 + new_h * new_w, D).

    ViT does this once, before it is trained at another size (section 3.2, "2D interpolation"). Here
    it happens in every forward pass, as pictures vary in size. As in the reference, the resizing is
    torch's bicubic (a = -0.75) with align_corners=False and without antialiasing. (timm
    antialiases, and so do DINOv2's models with registers, for which see VisionTransformer. Its
    models without registers scale by (new + 0.1) / old. Either changes a smooth table by 1 to 6%.)

    One departure: the reference resizes only if the *number* of patches differs. There, a picture
    of 16x64 patches reads the positions of a 32x32 table as they are; here it gets its own."""
    if same_size(old, new):  # old == new, in a form that torch.export can trace: the last part
        return pos_embed

    cls, patches = pos_embed.tensor_split([1], dim=1)
    patches = patches.mT.unflatten(2, old)  # (1, D, old_h, old_w)
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False)  # (1, D, *new)
    patches = patches.flatten(2).mT  # (1, new_h * new_w, D)
    return torch.cat([cls, patches], dim=1)


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

        # The formula above, as one kernel that never holds the (N, N) weights of all heads.
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # the heads side by side


class Mlp(nn.Module):
    """Two linear layers and between them, at four times the width, a GELU (the exact one, with erf,
    not its approximation with tanh). (B, N, D) -> (B, N, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One learned factor for each channel of a branch, near 0 at first: a new block changes x very
    little (Touvron et al. 2021, arXiv:2103.17239). Only DeiT-III and DINOv2 have it.
    (B, N, D) -> (B, N, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm encoder layer (ViT, eq. 2 and 3): x + attention(norm(x)), then x + mlp(norm(x)).

    The norms stand inside the branches, so that the sum x runs through all layers untouched. Their
    eps is 1e-6, as in ViT's own code, not torch's 1e-5: the pretrained weights expect it."""

    def __init__(self, width: int, heads: int, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()

        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D). factors: what the two branches are multiplied by, (2, B, 1, 1),
        see drop_path_factors; None: by nothing"""
        branch = self.ls1(self.attn(self.norm1(x)))
        if factors is not None:
            branch = branch * factors[0]
        x = x + branch

        branch = self.ls2(self.mlp(self.norm2(x)))
        if factors is not None:
            branch = branch * factors[1]
        return x + branch


def drop_path_factors(rate: float, depth: int, B: int, device: torch.device) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, leave branches out for
    some of the pictures. -> (depth, 2, B, 1, 1): what each layer multiplies its two branches by, 0
    where they are left out.

    The probability grows in equal steps from 0 in the first layer to `rate` in the last: early
    layers are left out least, because all later ones build on them. A branch that stays is divided
    by its probability of staying, so that its expected value does not change. One draw for all
    layers is one kernel to start, not 24. (Later mmsegmentation, 1.2, drops only the MLP branch.
    The published runs dropped both.)"""
    stays = 1 - torch.linspace(0, rate, depth, device=device)  # (depth,)
    stays = stays.view(depth, 1, 1, 1, 1)
    draws = torch.rand(depth, 2, B, 1, 1, device=device)  # one per picture, not one per token
    return (draws < stays) / stays


class VisionTransformer(nn.Module):
    """The backbone. (B, 3, H, W) -> four (B, D, h, w), after layers 3, 6, 9 and 12 of 12.

    width is a multiple of heads, depth of 4. grid is the side of the table of positions, in
    patches. drop_path is the rate of the last layer, layer_scale whether the branches have one. As
    in the reference there is no classifier and no dropout.

    The class token, from which the pretraining read its answer, has no use here. It goes through
    all layers nevertheless: in pretraining the patches learned to attend to it in each layer, and
    without it they would compute something else. The maps leave it out, as it lies nowhere in the
    picture.

    final_norm ("LN" in the names of the recipes): one LayerNorm after the last layer. The maps of
    earlier layers are not normalised (as in the reference), so it changes only the last map.

    registers: the number of further learned tokens that go through all layers. The network uses
    them as scratch space; without registers it uses plain background patches for that (Darcet et
    al. 2023, arXiv:2309.16588)."""

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
        self.layers_per_map = depth // 4
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.extra = 1 + registers  # tokens that lie nowhere in the picture

        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(width, eps=1e-6) if final_norm else None

        # For training from scratch: DeiT's initialisation.
        for tokens in self.parameters(recurse=False):  # class token, positions, registers
            nn.init.trunc_normal_(tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_grid(self, grid: Size) -> None:
        """Make room for a table of grid = (h, w) positions, for the weights of a model that was
        trained with such a table. If the size changes, the new table is not initialised: the caller
        has to load it."""
        if grid != self.grid:
            self.grid = h, w = grid
            table = self.pos_embed.new_empty(1, 1 + h * w, self.pos_embed.shape[2])
            self.pos_embed = nn.Parameter(table)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four (B, D, h, w)"""
        x = self.patch_embed(images)  # (B, D, h, w)
        B, D, h, w = x.shape
        layout = layout_of(x)  # tokens have none: the maps get it back, for the head's convolutions
        x = x.flatten(2).mT  # (B, h w, D)
        cls = self.cls_token.expand(B, -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + h w, D)
        x = x + resize_pos_embed(self.pos_embed, self.grid, (h, w))  # learned, and added (eq. 1)
        if self.reg_token is not None:
            # Registers have no positions, so they come after the sum. x: (B, extra + h w, D)
            x = torch.cat([x[:, :1], self.reg_token.expand(B, -1, -1), x[:, 1:]], dim=1)

        depth = len(self.blocks)
        factors = [None] * depth
        if self.training and self.drop_path > 0:
            factors = drop_path_factors(self.drop_path, depth, B, x.device)

        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x, factors[i])  # (B, extra + h w, D)
            done = i + 1  # layers
            if done == depth and self.norm is not None:
                x = self.norm(x)
            if done % self.layers_per_map == 0:
                patches = x[:, self.extra :].mT  # (B, D, h w)
                patches = patches.reshape(B, D, h, w)
                maps.append(patches.contiguous(memory_format=layout))
        return maps


# ---- The architectures ---------------------------------------------------------------------------
#
# The arguments of VisionTransformer except final_norm, and three more: channels, the width of the
# UPerNet head; drop_path_ln, the rate of drop path in recipes with a final norm, if it differs from
# drop_path; cls_position=False, if timm's model has no position for the class token
# (convert_weights.py gives it one of zeros, which adds nothing). A grid of 32 patches of 16 is a
# picture of 512.
#
# vit_b16, deit_b16 and deit_s16 have published recipes, the others do not. ViT-B and DeiT-B are one
# network; they differ in their pretrained weights and in drop path (ViT-B was released without it,
# except in the recipe with LN).
COMMON = dict(depth=12, patch=16, grid=32, channels=512, drop_path=0.1)
DEIT_3 = dict(COMMON, layer_scale=True, cls_position=False)
DINO_2 = dict(COMMON, layer_scale=True, patch=14, grid=37)  # 37 patches of 14: pictures of 518
REGISTERS = dict(DINO_2, registers=4, cls_position=False)
ARCHS = {
    "vit_b16":  dict(COMMON, width=768, heads=12, drop_path=0.0, drop_path_ln=0.1),
    "deit_b16": dict(COMMON, width=768, heads=12),
    "deit_s16": dict(COMMON, width=384, heads=6),
    "deit_t16": dict(COMMON, width=192, heads=3),
    # A miniature for the toy data and the tests: the same code, small enough for a laptop's CPU.
    "toy_p8":   dict(depth=4, patch=8, grid=16, channels=64, width=128, heads=2, drop_path=0.0),
    # ---- ViT-L, DeiT-III (arXiv:2204.07118), DINOv2 (arXiv:2304.07193), DINOv2 with registers
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

# What a neck's name means: whether there is (a LayerNorm after the backbone's last layer, a
# multi-level neck). A recipe's name ends with both, deit-s16_ln_mln, so one option chooses both.
NECKS = {
    "none":   (False, False),
    "ln":     (True, False),
    "mln":    (False, True),
    "ln_mln": (True, True),
}


def build_backbone(arch: str, neck: str) -> VisionTransformer:
    """The backbone of an architecture in ARCHS, with the final norm that the neck (one of NECKS)
    asks for. ValueError if a name is unknown."""
    if arch not in ARCHS or neck not in NECKS:
        raise ValueError(
            f"no {arch!r} with neck {neck!r}: an architecture is one of {', '.join(ARCHS)}, "
            f"a neck one of {', '.join(NECKS)}"
        )

    arguments = dict(ARCHS[arch])
    for name in ("channels", "cls_position"):  # upernet.py and convert_weights.py read these
        arguments.pop(name, None)
    final_norm, _ = NECKS[neck]
    rate_ln = arguments.pop("drop_path_ln", arguments["drop_path"])
    if final_norm:
        arguments["drop_path"] = rate_ln
    return VisionTransformer(**arguments, final_norm=final_norm)


# ---- Layouts and sizes ---------------------------------------------------------------------------


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout in memory of a map that a convolution gave. A step that computes in another layout
    brings its result back to this one. (In channels last some devices' gradients are slow or wrong:
    see evaluate.memory_format.)"""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def same_size(one: Size, other: Size) -> bool:
    """Whether two sizes (h, w) are equal. While torch.export traces for dynamic sizes: True only if
    they are equal for every picture size, because one traced graph has to serve them all."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(a == b) for a, b in zip(one, other))
    return tuple(one) == tuple(other)
