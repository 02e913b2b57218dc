"""tests/experiments.py: its changes still fit the code. (What they do is measured.)"""

import experiments
import pytest


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS, ids=lambda e: e.name)
def test_each_change_applies_once_and_leaves_files_that_compile(experiment, tmp_path):
    copy = tmp_path / "copy"
    experiments.copy_project(experiment, copy)

    for path in copy.glob("*.py"):
        changed = path.read_text(encoding="utf-8")
        compile(changed, path.name, "exec")
        before = experiments.read(path.name).splitlines()
        after = changed.splitlines()
        different = [new for old, new in zip(before, after, strict=True) if old != new]
        edits = [edit for edit in experiment.edits if edit.file == path.name]
        assert len(different) == len(edits)


def test_names_are_unique_and_no_two_make_the_same_change():
    names = [experiment.name for experiment in experiments.EXPERIMENTS]
    edits = [tuple(experiment.edits) for experiment in experiments.EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert len(set(edits)) == len(edits)


@pytest.mark.parametrize("text", ["x = 1\n", "x = 2\nx = 2\n"])
def test_a_change_whose_text_is_not_there_exactly_once_fails_by_name(text, tmp_path):
    (tmp_path / "model.py").write_text(text)
    edit = experiments.Edit("model.py", "x = 2", "x = 3")
    experiment = experiments.Experiment("lost", [edit], "", "", "")

    message = "lost: model.py holds 'x = 2' [02] times"
    with pytest.raises(SystemExit, match=message):
        experiments.patched(experiment, tmp_path)


def test_several_edits_of_one_file_are_all_made(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    edits = [experiments.Edit("a.py", f"{name} = 1", f"{name} = 2") for name in "xy"]
    experiment = experiments.Experiment("both", edits, "", "", "")
    assert experiments.patched(experiment, tmp_path) == {"a.py": "x = 2\ny = 2\n"}
