"""What a new user sees first: the end of the toy run, and its progress on a terminal."""

import io
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import ade20k
import evaluate
import train


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """What a terminal shows of text: carriage returns, and the erasing of the rest of a line."""
    lines = []
    for line in text.split("\n"):
        cells = []
        at = 0
        for part in re.findall(r"\r|\x1b\[K|[^\r\x1b]", line):
            if part == "\r":
                at = 0
            elif part == "\x1b[K":
                del cells[at:]
            else:
                cells[at : at + 1] = [part]
                at += 1
        lines.append("".join(cells))

    return lines


@pytest.mark.parametrize("rank", [0, 1])
def test_between_the_lines_of_a_run_a_terminal_shows_how_far_it_is(rank, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run = SimpleNamespace(
        rank=rank,
        args=SimpleNamespace(iters=800),
        window=np.zeros(4),
        clock=train.monotonic(),
    )

    for n in (7, 8):
        train.log(run, n, [3.0, 2.0, 1.0], finite=True)
    assert run.window.tolist() == [6.0, 4.0, 2.0, 2]
    want = "8 of 800 iterations, 0 s" if rank == 0 else ""
    assert screen(terminal.getvalue()) == [want]


def test_what_follows_progress_is_written_over_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    ade20k.progress("7 of 800 iterations")
    print("error: a sentence that is longer than the progress", file=sys.stderr)
    ade20k.progress("a long text that goes before a short one")
    ade20k.progress("")
    print("short", file=sys.stderr)

    want = ["error: a sentence that is longer than the progress", "short", ""]
    assert screen(terminal.getvalue()) == want


def test_elsewhere_than_on_a_terminal_progress_says_nothing(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    ade20k.progress("7 of 800 iterations")
    assert file.getvalue() == ""


def test_what_a_toy_run_proposes_at_its_end_exists():
    commands = [line.split("#")[0].split() for line in train.AFTER_TOY.splitlines()]
    scripts = [words[1:] for words in commands if words[0] == "python"]
    assert len(scripts) == 2

    for script, *arguments in scripts:
        if script == "evaluate.py":
            args = evaluate.parse(arguments)
            assert args.inside
            assert args.image.startswith("data/toy/images/validation/toy_0")
        else:
            assert os.path.exists(os.path.join(ROOT, script))

    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        assert "## Your own data" in file.read()


@pytest.mark.parametrize("data", ["toy", "elsewhere"])
def test_a_toy_run_ends_with_its_sheet_and_what_to_try_next(data):
    said = []
    run = SimpleNamespace(
        saved="runs/a/checkpoint_2.pt",
        val_pairs=[1],
        world=1,
        args=SimpleNamespace(data=data, iters=2),
        say=said.append,
        path=lambda name: f"runs/a/{name}",
    )
    train.finish(run)
    want = [
        "runs/a/checkpoint_2.pt: evaluate it with `python evaluate.py`",
        "runs/a/sheet_2.png",
    ]
    if data == "toy":
        want.append(train.AFTER_TOY)
    assert said == want
