import http.server
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Runs that tests start have one thread. With two, torch's sums differed in the last bits in one of
# some twenty runs here, from the first iterations on, and runs are compared to the last bit.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
SAMPLE = os.path.join(os.path.dirname(ROOT), "shared", "ade20k_sample")

import ade20k  # noqa: E402
import formulas  # noqa: E402
import model  # noqa: E402
import upernet  # noqa: E402
from convert_weights import load_into, load_weights, to_mmseg  # noqa: E402

# In this process only: the goldens of whole evaluations were made at this size.
model.ARCHS["small"] = formulas.SMALL


@pytest.fixture
def sample():
    """The folder of twelve real ADE20K pictures; the test is skipped where it is not."""
    if not os.path.isdir(SAMPLE):
        pytest.skip("../shared/ade20k_sample is absent")
    return SAMPLE


@pytest.fixture
def golden():
    """golden(name) -> the reference's answers stored in tests/goldens/NAME.npz"""
    return lambda name: np.load(os.path.join(ROOT, "tests", "goldens", name + ".npz"))


def largest_error(got, want):
    """Between two arrays of numbers, whatever their types."""
    return np.abs(got.astype(float) - want).max()


def tensors(arrays):
    """{name: numpy array} -> {name: tensor}"""
    return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}


def by_formula(gold):
    """A golden's "shapes", lines of a name and its sizes -> {name: values of formulas.weight}"""
    weights = {}
    for line in gold["shapes"]:
        name, *dims = line.split()
        shape = tuple(int(dim) for dim in dims)
        weights[name] = formulas.weight(name, shape)
    return weights


def write(content, path):
    """Write with torch.save. -> the path as text"""
    torch.save(content, path)
    return str(path)


def load(content, path):
    """Write with torch.save, and read as load_weights does."""
    return load_weights(write(content, path))


def assert_equal(got, want):
    """The same bits, in all names of `want`."""
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def write_mmseg(state_dict, path, **more):
    """A checkpoint as mmsegmentation 0.17 writes it, with its names and the values that formulas.py
    gives those names."""
    weights = tensors(formulas.fill(to_mmseg(state_dict)))
    content = {"meta": {"mmseg_version": "0.17.0"}, "state_dict": weights, **more}
    return write(content, path)


@pytest.fixture
def filled(tmp_path):
    """filled(arch, neck) -> our model with the golden weights, loaded through a mmsegmentation
    file, dropout off."""

    def build(arch, neck):
        with torch.device("meta"):  # no initialisation: the file sets every value
            net = upernet.build_model(arch, neck)
        net.to_empty(device="cpu")
        path = write_mmseg(net.state_dict(), tmp_path / "mmseg.pth")
        state_dict, facts = load_weights(path)
        load_into(net, state_dict, facts)
        os.remove(path)

        net.backbone.drop_path = 0.0
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0
        return net

    return build


@pytest.fixture
def main(monkeypatch):
    """main(script, *arguments) runs a script's command line in this process: no new interpreter, no
    new import of torch."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()

    return call


class Watch(TorchDispatchMode):
    """Notes the operations that are asked for inside: `operations`, all their names; `waits`, those
    for which a program would wait for its GPU, since they bring a value, or the size of a result,
    to the CPU, or a tensor to the GPU (here: the device meta) before going on; `doubles`, those
    that make float64, which Apple's GPUs do not have."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.operations = []
        self.waits = []
        self.doubles = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        indices = args[1] if name in ("index", "index_put_") else ()
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        kwargs = kwargs or {}
        result = function(*args, **kwargs)

        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        travels = name == "_to_copy" and len({x.device for x in tensors}) > 1
        waits = travels and not kwargs.get("non_blocking")
        self.operations.append(name)
        if waits or masks or name in self.WAITS:
            self.waits.append(name)
        if any(x.dtype == torch.float64 for x in tensors):
            self.doubles.append(name)
        return result


class ReplayedRng:
    """np.random.RandomState behind the three methods of np.random.Generator that ade20k.py uses."""

    def __init__(self, seed):
        state = np.random.RandomState(seed)
        self.random = state.random_sample
        self.integers = state.randint
        self.uniform = state.uniform


def draw_set(root, training, validation):
    """A data set of so many small scenes of the toy kind, in ADE20K's layout, in the folder
    root."""
    for split, count in (("training", training), ("validation", validation)):
        images = root / "images" / split
        labels = root / "annotations" / split
        os.makedirs(images)
        os.makedirs(labels)

        for i in range(count):
            rng = np.random.default_rng([7, i])
            image, label = ade20k.draw_scene(rng)
            Image.fromarray(image).save(images / f"s{i}.jpg")
            Image.fromarray(label).save(labels / f"s{i}.png")


@pytest.fixture
def server():
    """A local HTTP server over `files`, {path: bytes}. `asked` lists the paths it was asked for.
    `faults` lists, one an answer, after how many bytes it breaks off; a negative number of them:
    after which it stalls for two seconds."""

    class Handler(http.server.BaseHTTPRequestHandler):
        files, faults, asked = {}, [], []

        def do_GET(self):
            self.asked.append(self.path)
            content = self.files.get(self.path)
            if content is None:
                return self.send_error(404)

            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

            fault = self.faults.pop(0) if self.faults else None
            self.wfile.write(content[: fault if fault is None else abs(fault)])
            if fault is not None and fault < 0:
                time.sleep(2)

        def log_message(self, *args):
            pass

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{service.server_port}"
    yield Handler
    service.shutdown()
