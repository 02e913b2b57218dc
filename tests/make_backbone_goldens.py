"""Ask timm, transformers, torchvision and mmsegmentation 1.2.2 for their features and store them as
tests/goldens/*.npz.

Run in an environment with the one asked for:  python tests/make_backbone_goldens.py
timm|transformers|torchvision
                                               python tests/make_backbone_goldens.py mmseg122 REFERENCE_DIR
timm 1.0.31, transformers 5.23.0 and torchvision 0.28.0 gave what is committed. Every model has
DeiT-T's dimensions and a position table of 32x32, so that nothing is resized, and weights by
formulas.py under the names its files carry."""

import os
import sys

import numpy as np
import torch
from formulas import fill, image, samples

HERE = os.path.dirname(os.path.abspath(__file__))
WIDTH, HEADS, SIZE = 192, 3, 512


def store(name, state_dict, features):
    path = os.path.join(HERE, "goldens", name + ".npz")
    np.savez_compressed(
        path,
        shapes=np.array([f"{k} {' '.join(map(str, v.shape))}" for k, v in state_dict.items()]),
        features=samples(features),
        largest=features.abs().max(),
    )
    print(path, os.path.getsize(path), "bytes")


def filled(model):
    model.load_state_dict(
        {k: torch.from_numpy(np.asarray(v)) for k, v in fill(model.state_dict()).items()}
    )
    return model.eval()


@torch.no_grad()
def main(kind):
    x = torch.from_numpy(image(SIZE, SIZE))
    if kind == "timm":
        import timm

        model = filled(timm.create_model("deit_tiny_patch16_224", img_size=SIZE))
        store(kind, model.state_dict(), model.forward_features(x)[:, 1:])
    elif kind == "transformers":
        import safetensors.torch
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=WIDTH,
                num_attention_heads=HEADS,
                intermediate_size=4 * WIDTH,
                image_size=SIZE,
                layer_norm_eps=1e-6,
            )
        ).eval()
        model.save_pretrained(
            "/tmp/vit"
        )  # its files carry other names than its modules: fill those
        path = "/tmp/vit/model.safetensors"
        names = fill(safetensors.torch.load_file(path))
        safetensors.torch.save_file(
            {k: torch.from_numpy(v) for k, v in names.items()}, path, metadata={"format": "pt"}
        )
        model = ViTForImageClassification.from_pretrained("/tmp/vit").eval()
        store(kind, safetensors.torch.load_file(path), model.vit(x).last_hidden_state[:, 1:])
    elif kind == "torchvision":
        from torchvision.models import VisionTransformer

        model = filled(VisionTransformer(SIZE, 16, 12, HEADS, WIDTH, 4 * WIDTH))
        tokens = torch.cat([model.class_token, model._process_input(x)], dim=1)
        store(kind, model.state_dict(), model.encoder(tokens)[:, 1:])
    elif kind == "mmseg122":
        sys.path.insert(0, sys.argv[2])
        import mmseg122

        model = filled(mmseg122.build("deit_s16", "mln")[0])
        logits = model.decode_head.forward(model.extract_feat(torch.from_numpy(image(97, 131))))
        store(kind, model.state_dict(), logits)


if __name__ == "__main__":
    main(sys.argv[1])
