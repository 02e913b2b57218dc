"""Time against the picture's area and against the batch, and the operations that the mathematics
asks for as a share of what a matrix product reaches right before (a machine's speed drifts): the
table in README.md, "Speed". Nothing else may run meanwhile.

    python tests/scaling.py [--arch deit_s16 --neck none]           # about ten minutes on two cores
"""

import argparse
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import ade20k  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from upernet import build_model  # noqa: E402

DEVICE = torch.device("cpu")


def step(model, size, batch, dtype=torch.float32):
    """-> a function that takes one training step on random pictures."""
    rng = np.random.default_rng(0)
    optimizer, scaler = train.build_optimizer(model, "adamw", 6e-5), torch.amp.GradScaler(
        "cpu", enabled=False
    )
    data = (
        torch.from_numpy(rng.integers(0, 256, (batch, 3, size, size), np.uint8)),
        torch.from_numpy(rng.integers(0, 150, (batch, size, size), np.uint8)),
        torch.tensor([[size, size]] * batch),
    )

    def once():
        train.gradients(model, data, batch, scaler, DEVICE, dtype)
        optimizer.step()
        optimizer.zero_grad()

    return once


def forward(model, size, batch):
    """-> a function that takes `batch` pictures to logits at the head's size."""
    x = torch.randn(batch, 3, size, size)

    def once():
        with torch.inference_mode():
            model.decode_head(model.features(x))

    return once


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="deit_s16")
    parser.add_argument("--neck", default="none")
    args = parser.parse_args()
    ade20k.keep_memory()
    print("| | inference, s | of peak | training, s | of peak |\n|---|---|---|---|---|")
    for size, batch, name in [(s, 2, f"2 pictures of {s}x{s}") for s in (256, 512, 768, 1024)] + [
        (256, b, f"{b} pictures of 256x256") for b in (1, 2, 4, 8)
    ]:
        row = [name]
        for training in (False, True):
            if training and batch == 1:  # BatchNorm
                row += ["", ""]
                continue
            model = build_model(args.arch, args.neck).train(training)
            rate = evaluate.matmul_rate(DEVICE, torch.float32)
            seconds = evaluate.measure((step if training else forward)(model, size, batch), DEVICE)[
                0
            ]
            flops = evaluate.count_flops(args.arch, args.neck, size, size, training) * batch
            row += [f"{seconds:.3f}", f"{flops / seconds / rate:.0%}"]
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
