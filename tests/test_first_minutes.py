"""What a new user sees first: progress on a terminal, and what the end of the toy run proposes."""

import io
import os
import re
import sys

from conftest import ROOT

import ade20k
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


def test_elsewhere_than_on_a_terminal_no_progress_is_printed(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    ade20k.progress("7 of 800 iterations")
    ade20k.progress("")
    assert file.getvalue() == ""


def test_what_a_toy_run_proposes_at_its_end_exists():
    commands = [line.split("#")[0].split() for line in train.AFTER_TOY.splitlines()]
    scripts = [words[1:] for words in commands if words[0] == "python"]
    assert len(scripts) == 2

    for script, *arguments in scripts:
        assert os.path.exists(os.path.join(ROOT, script))
        if "--image" in arguments:
            image = arguments[arguments.index("--image") + 1]
            assert re.fullmatch(r"data/toy/images/validation/toy_0[0-2]\d\.jpg", image)

    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        assert "## Your own data" in file.read()
