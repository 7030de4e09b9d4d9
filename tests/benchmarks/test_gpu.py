"""The command for a GPU: its time, its files, its errors and its counting, without one."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import devices
from benchmarks.gpu import worker as worker_module
from benchmarks.gpu.__main__ import arguments
from benchmarks.gpu.all_stages import DRY_SHARES, SHARES
from benchmarks.gpu.flops import forward_passes, operations
from benchmarks.gpu.report import write_report
from benchmarks.gpu.stages import NOT_REACHED, Budget, Entry, Setting, Stage, run_stages
from benchmarks.gpu.steps import HostWaits
from benchmarks.gpu.worker import FAILED, NO_MEMORY, PASSED, REFUSED, TOO_SLOW, Refused, Worker, attempt
from benchmarks.measuring import ROOT
from results.__main__ import main as results_main
from results.pages import section as results_section
from stillhouse.networks import MLP

MACHINE = {
    "device": "cpu",
    "cpu": "a processor",
    "gpu": None,
    "peak_tflops": None,
    "torch": "2",
    "lightning": "2",
    "python": "3",
}


class Here:
    """Carries entries out in this process."""

    def call(self, function, *arguments, seconds):
        return attempt(function, *arguments)[0]


class Stages:
    """Stages whose entries take ten seconds each of a clock that they move themselves."""

    def __init__(self, folder: Path):
        self.folder, self.seconds, self.measured, self.said = folder, 0.0, [], []

    def stage(self, name, *entries, missing=None, error=None):
        def measure(setting, options, seconds):
            self.measured.append(options["what"])
            self.seconds += 10
            if error:
                raise error
            return {"figure": 1.5}

        def table(rows):
            return [f"| {row['what']} | {row.get('figure')} |" for row in rows]

        listed = [Entry(f"entry {what}", {"what": what}, least=6) for what in entries]
        return Stage(name, f"stage {name}", lambda setting: listed, measure, table, lambda setting: missing)

    def run(self, shares, seconds, **options):
        self.measured = []
        budget = Budget(seconds, now=lambda: self.seconds)
        run_stages(shares, Setting("cpu"), MACHINE, self.folder, budget, Here(), say=self.said.append, **options)

    def rows(self, name):
        content = json.loads((self.folder / f"{name}.json").read_text())
        assert content["complete"] == all(row["status"] != NOT_REACHED for row in content["entries"])
        return {row["what"]: row["status"] for row in content["entries"]}


def test_a_second_call_goes_on_where_the_time_of_the_first_ended(tmp_path):
    stages = Stages(tmp_path)
    one = {stages.stage("one", "a", "b", "c"): 1.0}
    stages.run(one, 25)
    assert stages.measured == ["a", "b"]
    assert stages.rows("one") == {"a": PASSED, "b": PASSED, "c": NOT_REACHED}
    stages.run(one, 25)
    assert stages.measured == ["c"]
    assert set(stages.rows("one").values()) == {PASSED}
    stages.run(one, 25)
    assert stages.measured == []
    assert "complete" in stages.said[-1]


def test_time_is_shared_and_what_a_stage_leaves_goes_to_the_next(tmp_path):
    stages = Stages(tmp_path)
    shares = {
        stages.stage("first", *"abcd"): 1.0,  # 20 of 60 seconds
        stages.stage("absent", "e", missing="there is no such thing here"): 9.0,
        stages.stage("last", *"fgh"): 2.0,
    }
    stages.run(shares, 60)
    assert stages.measured == [*"ab", *"fgh"]
    stages.run(shares, 100)
    assert stages.measured == [*"cd"]
    assert "Skipped: there is no such thing here." in write_report(list(shares), tmp_path)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("not like this"), FAILED),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), NO_MEMORY),
        (Refused("never like this"), REFUSED),
    ],
)
def test_an_error_becomes_a_row_and_does_not_end_the_run(error, status, tmp_path):
    stages = Stages(tmp_path)
    shares = {stages.stage("broken", "a", "b", error=error): 1.0, stages.stage("sound", "c"): 1.0}
    stages.run(shares, 100)
    assert stages.rows("broken") == {"a": status, "b": status}
    assert stages.rows("sound") == {"c": PASSED}
    text = write_report(list(shares), tmp_path)
    assert f"entry a: {status}." in text
    assert "| c | 1.5 |" in text
    row = json.loads((tmp_path / "broken.json").read_text())["entries"][0]
    if status != REFUSED:
        assert row["error"] == type(error).__name__
        assert row["where"].startswith("tests/benchmarks/test_gpu.py:")
        assert row["where"].endswith(" in measure")
    stages.run(shares, 100)
    assert stages.measured == []
    stages.run(shares, 100, retry=True)
    assert stages.measured == ([] if status == REFUSED else ["a", "b"])


def pid():
    return {"pid": os.getpid()}


def broken_context():
    raise RuntimeError("CUDA error: device-side assert triggered")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_lives_on_after_an_error_and_is_replaced_after_worse(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "_free_memory", lambda: None)  # slow in a process of so many tests
    with Worker(tmp_path / "log") as worker:

        def call(function, *arguments, seconds=60.0):
            return worker.call(function, *arguments, seconds=seconds)

        first = call(pid)["pid"]
        assert first != os.getpid()
        assert call(int, "no number")["status"] == FAILED
        assert call(pid)["pid"] == first
        assert "device-side assert" in call(broken_context)["message"]
        second = call(pid)["pid"]
        assert second != first
        assert "SIGKILL" in call(killed)["message"]
        third = call(pid)["pid"]
        assert third != second
        assert call(time.sleep, 60, seconds=0.1)["status"] == TOO_SLOW
        assert call(pid)["pid"] != third
    assert "no number" in (tmp_path / "log").read_text()


def test_operations_and_passes_are_those_of_the_formulas():
    network = MLP(1, 2, 2, width=16, num_blocks=1)
    weights = [module.weight for module in network.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    assert operations(network, torch.device("cpu"))[0] == sum(2 * weight.numel() for weight in weights)
    # Fake score: the student's images, then forward and backward. Generator: student forward and backward, both scores.
    assert forward_passes("diff_instruct") == {"student": 2.0, "fake_score": 2.0, "teacher": 0.5}
    # With a GAN: the encoder of a generated and a real image with its weights' gradients, and of one with the image's.
    with_gan = forward_passes("diff_instruct, GAN")
    assert with_gan == {"student": 2.0, "fake_score": 2.0, "teacher": 0.5, "fake_score's encoder": (3 + 3 + 2) / 2}


def test_waits_for_the_device_are_listed_by_their_lines_in_one_cycle(monkeypatch):
    modes, device = [], SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = HostWaits(first=2)
    for step in range(6):
        waits.on_train_batch_start(SimpleNamespace(global_step=step), device)
        if modes[-1:] == ["warn"]:  # as torch does: of the line that asks for a value
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        waits.on_train_batch_end(SimpleNamespace(global_step=step + 1), device)
    assert modes == ["warn", "default"]
    ((line, count),) = waits.lines.items()
    assert line.startswith(__file__)
    assert count == 2  # the steps of a cycle


def test_peaks_are_found_by_the_cards_names():
    names = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989.4,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A10": 125,
        "NVIDIA L40S": 362.1,
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "Tesla T4": None,
    }
    assert {name: devices.peak_tflops(name) for name in names} == names


def test_entries_have_names_of_their_own_and_the_first_are_the_most_valuable():
    for setting in (Setting("cuda", gpus=2, peak_tflops=989.4), Setting("cpu")):
        for stage in SHARES:
            entries = list(stage.entries(setting))
            assert entries
            assert len({entry.name for entry in entries}) == len(entries)
            json.dumps([entry.options for entry in entries])
    assert set(DRY_SHARES) == set(SHARES)
    (steps,) = (stage for stage in SHARES if stage.name == "steps")
    first = [entry.name for entry in steps.entries(Setting("cuda"))][:2]
    assert first == [
        f"diff_instruct, cifar10, batch 128, bf16-mixed{form}" for form in ("", ", compiled, channels last")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes must be a positive number"),
        (["--fastgen", "/nowhere"], "no checkout of FastGen there"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        arguments(["--out", str(tmp_path), *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


# Makes packages look absent that a machine with torch, torchvision, Lightning and torchmetrics lacks, and the wheels of
# docs/how_to/gpu.md do not bring.
BARE = """
import importlib.metadata, sys
absent = "wandb tensorboard torch_fidelity matplotlib diffusers scipy sklearn pandas lmdb optuna joblib sphinx pytest".split()
sys.modules.update(dict.fromkeys(absent))
installed = importlib.metadata.Distribution.from_name
def from_name(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.Distribution.from_name = from_name
"""


@pytest.mark.slow
def test_a_dry_run_on_a_bare_machine_leaves_files_that_can_be_read_back(tmp_path):
    run = f"from benchmarks.gpu.__main__ import main; main(['--device', 'cpu', '--minutes', '1', '--out', {str(tmp_path)!r}])"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{BARE}{run}"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 90  # a minute, and what starting and ending Python takes on a busy machine
    text = (tmp_path / "report.md").read_text()
    assert text in done.stdout
    for stage in DRY_SHARES:
        content = json.loads((tmp_path / f"{stage.name}.json").read_text())
        rows = content["entries"]
        if "skipped" in content:
            continue
        assert [row["entry"] for row in rows] == [entry.name for entry in stage.entries(Setting("cpu"))]
        assert {row["status"] for row in rows} <= {PASSED, NOT_REACHED}, rows
        assert rows[0]["status"] == PASSED
        assert content["title"][1:] in text
    results_main(["gpu", str(tmp_path / "benchmarks_gpu.json"), str(tmp_path)])
    assert results_section(tmp_path / "benchmarks_gpu.json") in text
