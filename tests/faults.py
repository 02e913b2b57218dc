"""Faults, injected for real: signals, kill -9, damaged files, a full disk, a folder that vanishes,
processes that die, hang or differ, numbers that are not finite.

    python -m pytest tests/faults.py    about fifteen minutes; .ci/run does it too, pytest tests not
    python tests/faults.py 50           so many random kills of one run, which must end with the
                                        weights of a run that was left alone"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from itertools import zip_longest

import pytest
import torch
from conftest import ROOT, draw_set

import train

OPTIONS = (
    *("--data", "set", "--arch", "toy_p8", "--pretrained", "none", "--lr", 1e-3, "--warmup", 5),
    *("--iters", 110, "--interval", 30, "--batch-size", 4, "--crop-size", 32, "--short-side", 32),
    *("--timeout", 60),
)
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2")

# Seconds until a run that says nothing counts as one that hangs. What may pass where nothing does:
# --timeout, here 60, until the processes of a run give up one that does not answer; the half minute
# that torchrun gives processes to obey SIGTERM, before it kills them; and all of it once more after
# a restart. The rest is for busy machines.
HANGS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    draw_set(folder / "set", 8, 3)
    return folder


def start(folder, *arguments, launch=(), env=os.environ, **more):
    """train.py in a process group of its own, as a terminal or a cluster would start it. Python
    says on SIGABRT where it stands."""
    return subprocess.Popen(
        [sys.executable, *launch, os.path.join(ROOT, "train.py"), *map(str, arguments)],
        cwd=folder,
        env={**env, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def finish(process, code=0, timeout=HANGS):
    """What a run said, when it has ended with this code."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        fail_where_it_stands(process)

    assert process.returncode == code, (process.returncode, out[-500:], err[-2000:])
    return out, err


def wait_for(path, process, seconds=HANGS):
    """Until a file is there: how far the run is."""
    end = time.monotonic() + seconds
    while not glob(str(path)):
        if process.poll() is not None or time.monotonic() > end:
            fail_where_it_stands(process)
        time.sleep(0.01)


def fail_where_it_stands(process):
    """End a run and the test, with what each process of it was doing."""
    for pid in workers_of(process).values():
        os.kill(pid, signal.SIGABRT)
    process.send_signal(signal.SIGABRT)  # (does nothing where it has ended)

    out, err = process.communicate()
    pytest.fail(f"hangs, or has ended with {process.returncode}: {out[-1000:]} {err[-9000:]}")


def workers_of(process):
    """The training processes under a torchrun: {rank: pid}."""
    found = {}
    for path in glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                variables = dict(v.split(b"=", 1) for v in file.read().split(b"\0") if b"=" in v)
            with open(path.replace("environ", "stat")) as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue

        if parent == process.pid and b"LOCAL_RANK" in variables:
            found[int(variables[b"LOCAL_RANK"])] = int(path.split("/")[2])
    return found


def result(work, iters=110):
    """(all that a run computed, its log without what the clock says)"""
    with open(work / "log.jsonl") as file:
        log = [json.loads(line) for line in file]
    kept = [{k: v for k, v in e.items() if "second" not in k} for e in log if "args" not in e]

    content = torch.load(work / f"checkpoint_{iters}.pt", weights_only=True)
    tensors = content["model"]
    for number, state in content["optimizer"]["state"].items():
        for name, value in state.items():
            tensors[f"{name} {number}"] = value
    return tensors, kept


def assert_same(work, other):
    tensors, log = result(work)
    expected, expected_log = result(other)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in tensors)

    assert log == expected_log
    assert [e["iteration"] for e in log if "mIoU" in e] == [30, 60, 90, 110]


@pytest.fixture(scope="module")
def straight(folder):
    """The run that nothing disturbed."""
    finish(start(folder, *OPTIONS, "--work-dir", "straight"))
    return folder / "straight"


@pytest.mark.parametrize(
    "number,workers",
    [(signal.SIGINT, 2), (signal.SIGTERM, 0), (signal.SIGUSR1, 2), (signal.SIGKILL, 2)],
)
def test_a_run_stopped_by_a_signal_and_resumed_is_the_run_that_was_not(
    number, workers, straight, folder
):
    work = folder / number.name
    run = start(folder, *OPTIONS, "--work-dir", work, "--workers", workers)
    wait_for(work / "checkpoint_30.pt", run)
    time.sleep(random.random())  # in the validation, before or after it
    os.killpg(run.pid, number)  # to the loader's processes too, as from a terminal or a cluster

    if number == signal.SIGKILL:
        finish(run, -9)
    else:
        out, err = finish(run, 128 + number)
        assert "continue with --resume" in err or "--resume starts with that validation" in err

    finish(start(folder, "--resume", "--work-dir", work, "--workers", 2 - workers))
    assert_same(work, straight)
    assert len(glob(str(work / "checkpoint_*.pt"))) == 2 and not glob(str(work / "*.part"))


def test_a_second_signal_leaves_at_once(folder):
    """Where the first one is not answered, as an iteration takes long."""
    code = "at(1, lambda: (open('asleep', 'w'), time.sleep(100)))"
    run = start_changed(folder, code, *BRIEF, "--work-dir", "twice")
    wait_for(folder / "asleep", run)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(3)
    os.kill(run.pid, signal.SIGTERM)

    out, err = finish(run, 128 + signal.SIGTERM)
    assert "continue" not in err


def test_a_loader_whose_run_died_before_it_began_does_not_stay():
    """It holds the output open, so communicate() would wait for it: this is how a test of the
    signals once hung."""
    code = (
        "import multiprocessing, os, time, evaluate\n"
        "def work():\n    time.sleep(1)\n    evaluate.start_worker(0)\n    time.sleep(100)\n"
        "multiprocessing.get_context('fork').Process(target=work).start()\nos._exit(0)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    finish(run, timeout=30)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, straight, folder):
    work = folder / damage
    shutil.copytree(straight, work)
    newest, before = work / "checkpoint_110.pt", work / "checkpoint_90.pt"

    if damage == "cut":
        os.truncate(newest, os.path.getsize(newest) // 2)
    else:  # one bit of one weight, which only a checksum can tell
        with open(newest, "r+b") as file:
            file.seek(os.path.getsize(newest) // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    out, err = finish(start(folder, "--resume", "--work-dir", work))
    assert f"warning: {newest}: " in err
    assert "iterations 90 to 110" in out and before.exists()
    assert_same(work, straight)


def limit_files():
    """No file above 1 MB, until the limit is raised: for the process that is about to start."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))


def test_a_full_disk_is_said_survived_and_leaves_the_old_files_whole(straight, folder):
    """A limit on the size of any file stands for the disk: it holds the log and not a checkpoint,
    until it is raised."""
    work = folder / "full"
    run = start(folder, *OPTIONS, "--work-dir", work, preexec_fn=limit_files)
    wait_for(work / "sheet_30.png", run)  # (drawn after checkpoint 30 was tried)
    assert not glob(str(work / "checkpoint_*"))

    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    out, err = finish(run)
    assert "checkpoint_30.pt is not written" in err and "training continues" in err
    assert_same(work, straight)


def test_a_disk_that_stays_full_ends_the_run_with_an_error(folder):
    options = (*OPTIONS, "--iters", 6, "--interval", 3, "--work-dir", "stays")
    out, err = finish(start(folder, *options, preexec_fn=limit_files), 1)
    assert "checkpoint_6.pt is not written" in err
    assert "the last checkpoint is not saved" in err
    assert not glob(str(folder / "stays" / "checkpoint*"))


def test_a_work_directory_that_vanishes_comes_back_with_the_whole_log(straight, folder):
    work = folder / "vanished"
    run = start(folder, *OPTIONS, "--work-dir", work)
    wait_for(work / "sheet_30.png", run)

    shutil.rmtree(work, ignore_errors=True)
    finish(run)
    assert_same(work, straight)


def test_a_log_that_is_damaged_or_gone_comes_back_with_the_checkpoint(straight, folder):
    work = folder / "half"
    os.makedirs(work)
    shutil.copy(straight / "checkpoint_90.pt", work)
    (work / "log.jsonl").write_text('{"iteration": 50, "lo')

    finish(start(folder, "--resume", "--work-dir", work))
    assert_same(work, straight)


@pytest.fixture(scope="module")
def watched(folder):
    """A run with a validation after each iteration -> all that a reader who looks at its best.pt
    again and again saw: sizes of whole files, and which iterations they were of."""
    work = folder / "best"
    options = ("--iters", 12, "--interval", 1, "--workers", 0, "--work-dir", work)
    run = start(folder, *OPTIONS, *options)
    seen = set()
    while run.poll() is None:
        if (work / "best.pt").exists():
            seen.add(torch.load(work / "best.pt", weights_only=True)["iteration"])
        time.sleep(0.02)
    finish(run)
    return work, seen


def test_the_best_checkpoint_is_whole_at_all_times_and_the_best(watched):
    work, seen = watched
    with open(work / "log.jsonl") as file:
        scores = [e for e in map(json.loads, file) if "mIoU" in e]
    best = max(scores, key=lambda e: (e["mIoU"], e["iteration"]))
    content = torch.load(work / "best.pt", weights_only=True)
    assert content["iteration"] == best["iteration"]

    highest, were_best = 0, set()
    for e in scores:
        if e["mIoU"] >= highest:
            highest = e["mIoU"]
            were_best.add(e["iteration"])
    assert seen and seen <= were_best


def test_the_best_checkpoint_is_neither_removed_nor_resumed_from(watched, folder):
    work = folder / "kept"
    shutil.copytree(watched[0], work)
    os.replace(work / "checkpoint_12.pt", work / "best.pt")
    out, err = finish(start(folder, "--resume", "--work-dir", work, "--keep", 1))
    assert "iterations 11 to 12" in out
    assert sorted(os.path.basename(p) for p in glob(str(work / "*.pt"))) == [
        "best.pt",
        "checkpoint_12.pt",
    ]


def test_a_data_set_that_changed_before_resume_is_said(straight, folder):
    shutil.copytree(folder / "set", folder / "changing")
    work = folder / "changed"
    options = ("--data", "changing", "--iters", 1, "--interval", 1, "--work-dir", work)
    finish(start(folder, *OPTIONS, *options))

    resume = ("--resume", "--work-dir", work, "--iters")
    out, err = finish(start(folder, *resume, 2))
    assert "pictures, crc" not in out

    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        root = folder / "changing" / kind / "training"
        os.rename(root / f"s0.{suffix}", root / f"t.{suffix}")
    out, err = finish(start(folder, *resume, 3))
    other = "from here on other pictures: "
    assert "11 pictures, crc" in out and f"{other}11 pictures, crc" in out

    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        os.remove(folder / "changing" / kind / "training" / f"t.{suffix}")
    out, err = finish(start(folder, *resume, 4))
    assert f"{other}10 pictures, crc" in out


def test_a_picture_that_cannot_be_drawn_ends_no_training(folder):
    code = "import train\ndef sheet(*_): return 1 / 0\ntrain.sheet = sheet\ntrain.main()"
    options = (*OPTIONS, "--iters", 2, "--interval", 1, "--work-dir", "undrawn")
    run = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, options)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    out, err = finish(run)
    for n in (1, 2):
        said = f"undrawn/sheet_{n}.png is not written (division by zero); training continues"
        assert said in err
    assert (folder / "undrawn" / "checkpoint_2.pt").exists()
    assert (folder / "undrawn" / "curves.png").exists()


def test_a_changed_argument_is_named_and_a_used_folder_refused(straight, folder):
    out, err = finish(
        start(folder, "--resume", "--work-dir", straight, "--lr", 5, "--seed", 3, "--workers", 1)
    )
    assert "--lr was 0.001 until here, from here on 5.0" in err and "--seed was 0 until here" in err
    assert "workers" not in err and "iterations 110 to 110" in out

    out, err = finish(start(folder, *OPTIONS, "--work-dir", straight), 2)
    assert "holds the checkpoints of a run" in err


# ---- a brief run, and what befalls it ----

BRIEF = (*OPTIONS, "--iters", 12, "--interval", 4, "--workers", 0)


def start_changed(folder, code, *arguments, launch=()):
    """train.py after some lines of code. In them at(i, function) has the main process call the
    function at the start of iteration i."""
    script = folder / f"changed{hash(code)}.py"
    script.write_text(AT + code + "\ntrain.main()\n")
    return subprocess.Popen(
        [sys.executable, *launch, script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


AT = """
import multiprocessing, os, signal, time, train, ade20k
rate = train.learning_rate
def at(n, function):
    def watched(i, *more):
        if i == n:
            function()
        return rate(i, *more)
    train.learning_rate = watched
"""


def assert_brief_runs_are_the_same(work, other):
    """But for BatchNorm's counters, which nothing reads: they count a step that is not taken."""
    got, want = result(work, 12), result(other, 12)
    assert got[0].keys() == want[0].keys()
    keys = [key for key in want[0] if "num_batches_tracked" not in key]
    assert all(torch.equal(got[0][key], want[0][key]) for key in keys)
    assert got[1] == want[1]


@pytest.fixture(scope="module")
def brief(folder):
    finish(start(folder, *BRIEF, "--work-dir", "brief"))
    return folder / "brief"


@pytest.fixture(scope="module")
def brief_two(folder):
    launch = (*TWO, "--standalone")
    finish(start(folder, *BRIEF, "--work-dir", "brief_two", launch=launch))
    return folder / "brief_two"


def resumed_from(work):
    args, checkpoint = train.parse(["--resume", "--work-dir", str(work)])
    return checkpoint["iteration"]


def test_resume_neither_continues_nor_removes_what_lies_below_the_work_directory(brief, folder):
    work = folder / "backed"
    shutil.copytree(brief, work)
    shutil.copytree(brief, work / "backup")
    os.rename(work / "backup" / "checkpoint_8.pt", work / "backup" / "checkpoint_99.pt")
    before = sorted(os.listdir(work / "backup"))

    out, err = finish(start(folder, "--resume", "--work-dir", work, "--iters", 16, "--keep", 1))
    assert "iterations 12 to 16" in out
    assert sorted(os.listdir(work / "backup")) == before
    assert [os.path.basename(p) for p in glob(str(work / "check*"))] == ["checkpoint_16.pt"]


def test_of_checkpoints_the_last_iteration_is_the_newest_whatever_their_files_times(brief, folder):
    work = folder / "touched"
    shutil.copytree(brief, work)
    os.utime(work / "checkpoint_8.pt", (4e9, 4e9))
    assert resumed_from(work) == 12


@pytest.mark.parametrize("damage", ["empty", "folder", "link to nothing", "text", "foreign"])
def test_whatever_is_wrong_with_a_checkpoint_the_one_before_it_is_used(
    damage, brief, folder, capsys
):
    work = folder / damage
    shutil.copytree(brief, work)
    newest = work / "checkpoint_12.pt"
    os.remove(newest)
    match damage:
        case "folder":
            newest.mkdir()
        case "link to nothing":
            newest.symlink_to("nothing.pt")
        case "foreign":
            torch.save({"backbone": torch.zeros(3)}, newest)
        case _:
            newest.write_text("PK or not" if damage == "text" else "")

    assert resumed_from(work) == 8
    assert f"warning: {newest}: " in capsys.readouterr().err


DIVERGE = """
build = train.build_model
def kept(*arguments):
    train.model = build(*arguments)
    return train.model
train.build_model = kept
def diverge():
    train.model.decode_head.bottleneck.bn.running_var.fill_(float("inf"))
at(6, diverge)
"""


def test_weights_that_are_not_finite_are_not_saved_and_cost_no_checkpoint(folder):
    """Infinite statistics, of which training sees nothing: its losses stay finite."""
    options = (*BRIEF, "--keep", 1, "--work-dir", "diverged")
    out, err = finish(start_changed(folder, DIVERGE, *options), 3)
    assert "the weights are not finite" in err and "diverged/checkpoint_4.pt" in err
    assert "not taken" not in out, "the losses are finite"
    left = [os.path.basename(path) for path in glob(str(folder / "diverged" / "checkpoint*"))]
    assert left == ["checkpoint_4.pt"]


def test_weights_that_are_finite_and_useless_push_out_no_checkpoint_however_often_resumed(folder):
    """A rate of 1e30 from iteration 6 on: the steps after it are not taken. Scripts resume again
    and again."""
    code = """
true_rate = rate
def rate(i, *more):
    return 1e30 if i >= 6 else true_rate(i, *more)
at(-1, None)
"""
    work = folder / "useless"
    options = (*BRIEF, "--iters", 100, "--keep", 1, "--work-dir", work)
    for resume in ((), ("--resume",), ("--resume",)):
        out, err = finish(start_changed(folder, code, *options, *resume), 3)
        assert "5 losses in a row were not finite" in err
        content = torch.load(work / "checkpoint_4.pt", weights_only=True)
        assert all(value.abs().max() < 1e6 for value in content["model"].values())


def test_weights_that_are_not_finite_name_one_checkpoint_in_all_processes_or_the_beginning(folder):
    for last, words in ((6, "from two_diverged/checkpoint_4.pt"), (2, "from two_diverged")):
        code = DIVERGE.replace("6", str(last))
        launch = (*TWO, "--standalone")
        options = (*BRIEF, "--work-dir", "two_diverged")
        out, err = finish(start_changed(folder, code, *options, launch=launch), 1)
        assert err.count(words) == 2 and "None" not in err
        shutil.rmtree(folder / "two_diverged")


# The last process cannot read its pictures any more; a loader dies; a loader hangs.
UNREADABLE = """
load = ade20k.load
def damaged(image, label, classes):
    return load("damaged.jpg", label, classes)
def fail():
    if os.environ.get("RANK", "1") == "1":
        ade20k.load = damaged
at(6, fail)
"""
KILLED = """
at(3, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
"""
INTERRUPTED = """
def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
train.build_model = interrupt
"""
HANGING = """
load, count = ade20k.load, []
def hang(*arguments):
    count.append(1)
    if len(count) > 30:
        signal.pause()
    return load(*arguments)
ade20k.load = hang
"""


@pytest.mark.parametrize(
    "code,workers,processes,words",
    [
        (UNREADABLE, 0, 1, "damaged.jpg: cannot be read as a picture"),
        (UNREADABLE, 0, 2, "damaged.jpg: cannot be read as a picture"),
        (KILLED, 1, 1, ""),  # where torch notices it decides about its words
        (HANGING, 1, 1, "DataLoader timed out after 10.0 seconds"),
    ],
    ids=["picture", "picture of one of two", "killed loader", "hanging loader"],
)
def test_what_cannot_be_fetched_ends_a_run_with_all_that_is_done_saved(
    code, workers, processes, words, request, folder
):
    straight = request.getfixturevalue("brief" if processes == 1 else "brief_two")
    launch = () if processes == 1 else (*TWO, "--standalone")
    data = (folder / "set/images/training/s0.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(data[:900])

    work = folder / request.node.callspec.id.replace(" ", "_")
    options = (*BRIEF, "--workers", workers, "--work-dir", work)
    out, err = finish(start_changed(folder, code, *options, launch=launch), 1)
    assert err.count("error: the next batch cannot be read: ") == 1 and words in err, err
    assert err.count("continue with --resume") >= processes
    if processes == 1:
        assert "Traceback" not in err  # (torchrun has one)

    done = max(int(path.stem.split("_")[1]) for path in work.glob("checkpoint_*.pt"))
    assert done == 6 if code == UNREADABLE else 3 <= done < 12
    assert f"stopped after iteration {done}: " in err
    assert json.loads((work / "log.jsonl").read_text().splitlines()[-1])["iteration"] <= done

    finish(start(folder, "--resume", "--work-dir", work, launch=launch))
    assert_brief_runs_are_the_same(work, straight)


def test_ctrl_c_before_training_ends_without_a_traceback(folder):
    out, err = finish(start_changed(folder, INTERRUPTED, *BRIEF, "--work-dir", "early"), 130)
    assert err == ""


# ---- numbers that are not finite ----


def test_a_loss_that_stays_not_finite_ends_the_run_with_code_3(folder):
    out, err = finish(start(folder, *OPTIONS, "--lr", 1e18, "--warmup", 0, "--work-dir", "wild"), 3)
    assert out.count("the loss is not finite, the step is not taken") == train.PATIENCE
    assert "set/images/training/s" in out
    assert "5 losses in a row were not finite" in err

    content = torch.load(folder / "wild" / f"checkpoint_{1 + train.PATIENCE}.pt", weights_only=True)
    for key, value in content["model"].items():
        if "running" in key:
            assert torch.isfinite(value).all(), "statistics were put back"


def test_one_bad_batch_changes_nothing_and_training_continues(folder, monkeypatch):
    """Iterations of the loop: good, bad, good, one with gradients too large for float16, good."""
    monkeypatch.chdir(folder)
    found, hooks, parts = [], [], {}  # found[i]: what iteration i finds of the run's parts
    normalise, build_model, rate = train.normalise, train.build_model, train.learning_rate
    scaler = torch.amp.GradScaler

    def bad_normalise(x, size):
        return normalise(x, size) * float("nan")

    def overflow(gradient):
        return gradient * float("inf")

    def kept_model(*arguments):
        parts["model"] = build_model(*arguments)
        return parts["model"]

    def float16_scaler(device, enabled):
        parts["scaler"] = scaler(device, 1024.0)
        return parts["scaler"]

    class KeptLog(train.Log):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            parts["log"] = self

    def watch(i, *more, **others):
        """The loop calls it at the start of each iteration."""
        model = parts["model"]
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        found.append((weights, list(parts["log"].steps), parts["scaler"].get_scale()))

        monkeypatch.setattr(train, "normalise", bad_normalise if i == 1 else normalise)
        if i == 3:
            hooks.append(model.backbone.pos_embed.register_hook(overflow))
        if i == 4:
            hooks[0].remove()
        return rate(i, *more, **others)

    monkeypatch.setattr(train, "learning_rate", watch)
    monkeypatch.setattr(train, "build_model", kept_model)
    monkeypatch.setattr(train, "Log", KeptLog)
    monkeypatch.setattr(train, "watch_signals", list)
    monkeypatch.setattr(torch.amp, "GradScaler", float16_scaler)
    options = (*OPTIONS, "--work-dir", "one", "--workers", 0, "--iters", 6, "--interval", 6)
    train.train(*train.parse([*map(str, options)]))
    assert_only_good_batches_changed(*zip(*found))

    log = [e for e in map(json.loads, open("one/log.jsonl")) if "skipped" in e]
    assert [e["iteration"] for e in log] == [2] and log[0]["skipped"].count(".jpg") == 4


def assert_only_good_batches_changed(weights, losses, scales):
    """What iterations 0 to 5 find, of which 1 has a bad batch and 3 gradients too large."""

    def same(i, key):
        return torch.equal(weights[i][key], weights[i + 1][key])

    token, statistic = "backbone.cls_token", "decode_head.bottleneck.bn.running_mean"
    assert not same(0, token) and not same(0, statistic)
    read = [key for key in weights[1] if "num_batches_tracked" not in key]  # nothing reads those
    assert all(same(1, key) for key in read) and losses[2] == losses[1]
    assert not same(2, token) and not same(2, statistic)

    # float16's scale is too large now and then: that is the scaler's to mend, and no bad batch.
    assert same(3, token) and not same(3, statistic) and len(losses[4]) == len(losses[3]) + 1
    assert scales == (1024,) * 4 + (512,) * 2
    assert not same(4, token)


# ---- several processes ----

NO_DROPOUT = """
import train
from torch import nn
build = train.build_model
def without_dropout(*arguments):
    net = build(*arguments)
    for m in net.modules():
        if isinstance(m, nn.Dropout2d): m.p = 0.0
    return net
train.build_model = without_dropout
train.main()
"""


def test_two_and_four_processes_give_the_weights_and_statistics_of_one(folder):
    """Four have one picture each. (Dropout depends on the process.)"""
    (folder / "no_dropout.py").write_text(NO_DROPOUT)
    got = []
    for count in (1, 2, 4):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count)
        options = (*OPTIONS, "--iters", 4, "--interval", 4, "--optimizer", "sgd")
        command = (*launch, "no_dropout.py", *options, "--work-dir", f"of_{count}")
        run = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=folder,
            text=True,
            capture_output=True,
            env=os.environ | {"PYTHONPATH": ROOT},
        )
        assert run.returncode == 0, run.stderr[-2000:]
        content = torch.load(folder / f"of_{count}" / "checkpoint_4.pt", weights_only=True)
        got.append(content["model"])
    for k, v in got[0].items():
        torch.testing.assert_close(got[1][k], v, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[2][k], v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    ["arguments", "data", "validation", "checkpoint", "iteration", "work directory"],
)
def test_a_process_that_would_train_something_else_is_refused_and_all_end(other, brief, folder):
    """Two nodes with files of their own, started without torchrun, which would end the second."""
    nodes = [folder / f"{other} {rank}" for rank in range(2)]
    for node in nodes:
        shutil.copytree(folder / "set", node / "set")
        if other in ("checkpoint", "iteration"):
            shutil.copytree(brief, node / "work")

    more = ("--resume",) if other in ("checkpoint", "iteration") else ()
    different = [(), ()]
    match other:
        case "arguments":
            different = [("--seed", 1), ("--seed", 2)]
        case "work directory":
            different = [("--work-dir", "work"), ("--work-dir", "play")]
        case "checkpoint":
            os.truncate(nodes[1] / "work" / "checkpoint_12.pt", 1000)
        case "iteration":  # another run's checkpoint of that name
            os.replace(*[nodes[1] / "work" / f"checkpoint_{n}.pt" for n in (8, 12)])
        case "data" | "validation":
            split = "training" if other == "data" else "validation"
            for kind, suffix in (("images", "jpg"), ("annotations", "png")):
                os.remove(nodes[1] / "set" / kind / split / f"s0.{suffix}")

    port = random.randrange(20000, 40000)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    runs = []
    for rank, node in enumerate(nodes):
        env = os.environ | group | {"RANK": str(rank)}
        options = (*BRIEF, *more, "--work-dir", "work", *different[rank])
        runs.append(start(node, *options, env=env))

    (out, first), (_, second) = [finish(run, 2) for run in runs]
    assert "error: another process has died" in first
    assert "error: a process has {" in second and "unlike process 0" in second
    said = dict(
        arguments="'seed': 2",
        data="10 pictures",
        validation="10 pictures",
        checkpoint="checkpoint_8.pt",
        iteration="'iteration': 8",
    )
    assert said.get(other, "'work_dir': 'play'") in second
    assert "loss" not in out


HANGS_AT_EXIT = """
import time, train
import torch.distributed as dist
dist.destroy_process_group = lambda: time.sleep(1000)  # as NCCL's may, while others wait
step = train.Log.step
def fail(log, n, *rest):
    if (n, log.rank) == (3, 1): raise ValueError("an error of one process")
    step(log, n, *rest)
train.Log.step = fail
train.main()
"""


def test_an_error_of_one_process_ends_it_at_once_and_then_the_other(folder):
    (folder / "hangs_at_exit.py").write_text(HANGS_AT_EXIT)
    command = (*TWO, "--standalone", "hangs_at_exit.py", *OPTIONS, "--work-dir", "one_error")
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=HANGS,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    assert run.returncode == 1
    assert "ValueError: an error of one process" in run.stderr


@pytest.fixture(scope="module")
def straight_two(folder):
    finish(start(folder, *OPTIONS, "--work-dir", "two", launch=(*TWO, "--standalone")))
    return folder / "two"


def test_a_killed_process_is_restarted_from_the_last_checkpoint(straight_two, folder):
    work = folder / "restarted"
    torchrun = (*TWO, "--standalone", "--max-restarts", "1")
    run = start(folder, *OPTIONS, "--work-dir", work, launch=torchrun)
    wait_for(work / "checkpoint_60.pt", run)
    os.kill(workers_of(run)[1], signal.SIGKILL)

    out, err = finish(run)
    assert "iterations 60 to 110" in out or "iterations 90 to 110" in out
    assert_same(work, straight_two)


def test_ctrl_c_under_torchrun_saves_once_and_resumes(straight_two, folder):
    work = folder / "interrupted"
    run = start(folder, *OPTIONS, "--work-dir", work, launch=(*TWO, "--standalone"))
    wait_for(work / "checkpoint_30.pt", run)
    # The terminal's: torchrun and its processes all get it, and torchrun passes it on.
    os.killpg(run.pid, signal.SIGINT)

    out, err = run.communicate(timeout=HANGS)
    assert run.returncode != 0 and "--resume" in err
    finish(start(folder, "--resume", "--work-dir", work, launch=(*TWO, "--standalone")))
    assert_same(work, straight_two)


def test_a_process_that_hangs_ends_the_others_inside_the_timeout(folder):
    options = ("--work-dir", "hang", "--timeout", 5, "--workers", 0)  # loaders have a sixth of it
    run = start(folder, *OPTIONS, *options, launch=(*TWO, "--standalone"))
    wait_for(folder / "hang" / "checkpoint_30.pt", run)
    stopped = workers_of(run)[1]
    os.kill(stopped, signal.SIGSTOP)

    began = time.monotonic()
    out, err = run.communicate(timeout=90)
    assert run.returncode != 0 and "error: another process has died or hangs" in err
    # (torchrun itself waits half a minute for the one that hangs.)
    assert time.monotonic() - began < 60


def test_two_nodes_train_and_evaluate_as_one_does(straight_two, folder):
    port = random.randrange(20000, 40000)
    torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1")
    torchrun += ("--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank")
    agents = [(*torchrun, str(k)) for k in range(2)]
    # (torchrun gives each of several processes of a node one thread, and threads change the order
    # of sums.)
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        start(folder, *OPTIONS, "--work-dir", "nodes", launch=agent, env=threads)
        for agent in agents
    ]
    for run in runs:
        finish(run)
    assert_same(folder / "nodes", straight_two)

    script = os.path.join(ROOT, "evaluate.py")
    command = (script, "--checkpoint", "nodes/checkpoint_110.pt", "--json")
    alone = [sys.executable, *command, "one.json"]
    subprocess.run(alone, cwd=folder, check=True, capture_output=True)
    both = [
        subprocess.Popen(
            [sys.executable, *agent, *command, "two.json"], cwd=folder, stdout=subprocess.DEVNULL
        )
        for agent in agents
    ]
    assert [process.wait(HANGS) for process in both] == [0, 0]
    one, two = (json.loads((folder / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two


# ---- many kills ----


def stress(count: int) -> None:
    """Kill one run `count` times at random moments, resume it each time, and compare it with one
    that was left alone."""
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder, rng = pathlib.Path(name), random.Random(0)
        iters = 10 * count  # about as many as are left after so many kills
        options = ("--data", "toy", "--iters", iters, "--interval", 3)
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        finish(start(folder, *options, "--work-dir", "straight", env=one_thread), timeout=2000)

        kills, done = 0, False
        while not done:
            # Once enough kills are survived, the run is left to end.
            again = ("--resume",) if glob(str(folder / "killed" / "checkpoint_*.pt")) else options
            run = start(folder, *again, "--work-dir", "killed", env=one_thread)
            try:
                run.communicate(timeout=rng.uniform(4, 14) if kills < count else 2000)
                done = True
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.communicate()
                kills += 1
                left = [os.path.basename(p) for p in glob(str(folder / "killed" / "checkpoint_*"))]
                print(f"kill {kills}, it left {', '.join(left) or 'nothing'}", flush=True)

        tensors, log = result(folder / "straight", iters)
        killed, killed_log = result(folder / "killed", iters)
        differ = [key for key in tensors if not torch.equal(killed[key], tensors[key])]
        differ += [pair for pair in zip_longest(killed_log, log) if pair[0] != pair[1]]
        assert not differ, f"{len(differ)} tensors and lines differ: {differ[:4]}"
        print(f"{kills} kills survived: weights, optimizer state and log are equal to the last bit")


if __name__ == "__main__":
    stress(int(sys.argv[1]))
