"""The traced model at sizes it was not traced at, and ONNX as the README does it."""

import re
from pathlib import Path

import pytest
import torch
from conftest import write
from torch.export import Dim

from model import ARCHS
from upernet import build_model

ROOT = Path(__file__).parent.parent
TRACED = (2, 3, 75, 130)
OTHERS = [(1, 3, 61, 97), (2, 3, 64, 64), (3, 3, 128, 40), (1, 3, 33, 500)]
THIN = [(2, 3, 8, 200), (1, 3, 200, 8), (1, 3, 1, 1)]  # one patch, which is 8 pixels


@pytest.fixture
def tiny(monkeypatch):
    """build(neck, **more) -> a toy model in eval mode, with layers that ARCHS gives others."""

    def build(neck, **more):
        torch.manual_seed(0)
        monkeypatch.setitem(ARCHS, "tiny", dict(ARCHS["toy_p8"], **more))
        return build_model("tiny", neck, 5).eval()

    return build


@pytest.mark.parametrize(
    "neck, more",
    [
        ("none", {}),
        ("ln", dict(layer_scale=True, registers=4, patch=7)),
        ("mln", {}),
        ("ln_mln", dict(layer_scale=True, registers=4, patch=7)),
    ],
)
def test_what_is_exported_takes_pictures_of_any_size(tiny, neck, more):
    model = tiny(neck, **more)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(TRACED),), dynamic_shapes=(free,))

    for shape in OTHERS:
        images = torch.randn(shape)
        with torch.no_grad():
            got = program.module()(images)
            want = model(images)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=str(shape))

    # Where all maps have one size, for every picture, the fusion stays a plain convolution:
    # four pooled maps of three taps each are all that is brought to another size.
    taps = sum("baddbmm" in str(node.target) for node in program.graph.nodes)
    assert taps == (4 * 3 if neck in ("none", "ln") else (4 + 3 + 2) * 3)


@pytest.mark.parametrize("neck", ["none", "ln", "mln", "ln_mln"])
def test_the_readmes_onnx_file_labels_pictures_of_any_size(neck, tiny, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    model = tiny(neck)
    name = "runs/toy_p8_none_toy_800/best.pt"
    (tmp_path / name).parent.mkdir(parents=True)
    content = {"model": model.state_dict(), "args": {"arch": "toy_p8", "neck": neck}}
    write(content, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*torch\.onnx[^`]*)```", text)
    assert name in block
    exec(block, {})

    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    for shape in OTHERS + THIN:
        images = torch.randn(shape)
        with torch.no_grad():
            want = model(images)
        (got,) = session.run(None, {"images": images.numpy()})
        got = torch.from_numpy(got)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), shape
        assert torch.equal(got.argmax(1), want.argmax(1)), shape
