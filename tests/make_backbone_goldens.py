"""Ask timm, transformers, torchvision and mmsegmentation 1.2.2 for their features and store them as
tests/goldens/*.npz.

Run in an environment with the one asked for:

    python tests/make_backbone_goldens.py timm|transformers|torchvision
    python tests/make_backbone_goldens.py mmseg122 REFERENCE_DIR

timm 1.0.31, transformers 5.23.0 and torchvision 0.28.0 gave what is committed. Every model has a
position table of the size that its pictures need, so that nothing is resized, and weights by
formulas.py under the names its files carry. ViT has DeiT-T's dimensions, the others are the small
ones of their kind."""

import os
import sys
import tempfile

import numpy as np
import torch
from formulas import fill, image, samples

HERE = os.path.dirname(os.path.abspath(__file__))
WIDTH, HEADS, SIZE = 192, 3, 512


def store(name, state_dict, features, **more):
    path = os.path.join(HERE, "goldens", name + ".npz")
    np.savez_compressed(
        path,
        shapes=np.array([f"{k} {' '.join(map(str, v.shape))}" for k, v in state_dict.items()]),
        features=samples(features),
        largest=features.abs().max(),
        **more,
    )
    print(path, os.path.getsize(path), "bytes")


def filled(model):
    model.load_state_dict(
        {k: torch.from_numpy(np.asarray(v)) for k, v in fill(model.state_dict()).items()}
    )
    return model.eval()


def through_timm():
    import timm

    for name, model, size in (
        ("timm", "deit_tiny_patch16_224", 512),
        ("timm_deit3", "deit3_small_patch16_224", 512),
        ("timm_dinov2", "vit_small_patch14_dinov2", 518),
        ("timm_dinov2_reg", "vit_small_patch14_reg4_dinov2", 518),
    ):
        model = filled(timm.create_model(model, img_size=size))
        tokens = model.forward_features(torch.from_numpy(image(size, size)))
        store(name, model.state_dict(), tokens[:, model.num_prefix_tokens :])


def through_transformers():
    import safetensors.torch
    import transformers as t

    sizes = dict(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    vit = t.ViTConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIZE,
        layer_norm_eps=1e-6,
    )

    for name, kind, config, extra in (
        ("transformers", t.ViTForImageClassification, vit, 1),
        ("transformers_dinov2", t.Dinov2Model, t.Dinov2Config(**sizes), 1),
        (
            "transformers_dinov2_reg",
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**sizes),
            5,
        ),
    ):
        # Its files carry other names than its modules: fill those.
        with tempfile.TemporaryDirectory() as folder:
            kind(config).save_pretrained(folder)
            path = os.path.join(folder, "model.safetensors")
            names = fill(safetensors.torch.load_file(path))
            names = {k: torch.from_numpy(np.asarray(v)) for k, v in names.items()}
            safetensors.torch.save_file(names, path, metadata={"format": "pt"})
            model = kind.from_pretrained(folder).eval()

        x = torch.from_numpy(image(config.image_size, config.image_size))
        tokens = getattr(model, "vit", model)(x).last_hidden_state
        store(name, names, tokens[:, extra:])


def through_torchvision():
    from torchvision.models import VisionTransformer

    model = filled(VisionTransformer(SIZE, 16, 12, HEADS, WIDTH, 4 * WIDTH))
    patches = model._process_input(torch.from_numpy(image(SIZE, SIZE)))
    tokens = torch.cat([model.class_token, patches], dim=1)
    store("torchvision", model.state_dict(), model.encoder(tokens)[:, 1:])


def through_mmseg122():
    sys.path.insert(0, sys.argv[2])
    import mmseg122

    model = filled(mmseg122.build("deit_s16", "mln")[0])
    logits = model.decode_head.forward(model.extract_feat(torch.from_numpy(image(97, 131))))
    config = mmseg122.config("deit_s16", "mln").pretty_text
    store("mmseg122", model.state_dict(), logits, config=config)


if __name__ == "__main__":
    with torch.no_grad():
        globals()["through_" + sys.argv[1]]()
