"""tests/experiments.py: its changes still fit the code. (What they do is measured.)"""

import experiments
import pytest


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS, ids=lambda e: e.name)
def test_each_change_applies_once_and_leaves_a_file_that_compiles(experiment, tmp_path):
    copy = tmp_path / "copy"
    experiments.copy_project(experiment, copy)
    changed = (copy / experiment.file).read_text(encoding="utf-8")
    compile(changed, experiment.file, "exec")

    with open(f"{experiments.PROJECT}/{experiment.file}", encoding="utf-8") as file:
        original = file.read()
    before = original.splitlines()
    after = changed.splitlines()
    different = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(different) == 1


@pytest.mark.parametrize("text", ["x = 1\n", "x = 2\nx = 2\n"])
def test_a_change_whose_text_is_not_there_exactly_once_fails_by_name(text, tmp_path):
    (tmp_path / "model.py").write_text(text)
    experiment = experiments.Experiment("lost", "model.py", "x = 2", "x = 3", "", "", "")

    message = "lost: model.py holds 'x = 2' [02] times"
    with pytest.raises(SystemExit, match=message):
        experiments.patched(experiment, tmp_path)
