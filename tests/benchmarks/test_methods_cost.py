"""The benchmark of all methods: which it measures, what it counts and prints; not how fast anything is."""

import json
import mmap
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import assert_spread

from benchmarks import methods, run
from benchmarks.cases import Case
from benchmarks.measuring import ROOT, peak_memory
from lightning_modules import ProgressiveDistillation
from results.pages import section

RANDOM = ("~recipe", "batch_size=4", "teacher.weights=null", "teacher.sha256=null")
TINY = Case("digits, tiny", overrides=("data=digits", *RANDOM, "teacher.network.model_channels=8"), cycle_rounds=1)
TURNS = [{"student": 1, "fake with gradient": 1}, {"student with gradient": 1, "fake": 1, "teacher": 1}]
ALONE = [{"student with gradient": 1}]
SFD = [
    {"student with gradient": 1, "teacher": 8},
    {"student with gradient": 1, "teacher": 4},
]  # the first step is analytic
EVALUATIONS = {
    "pretrain": ALONE,
    "denoising_student": ALONE,
    "diff_instruct": TURNS,
    "diff_instruct, two_sided": [{"student with gradient": 1, "fake with gradient": 1, "teacher": 1}],
    "degradation": [{"student with gradient": 1, "teacher": 1}],
    "disback": TURNS,
    "progressive": [{"student with gradient": 1, "teacher": 2}],
    "sfd": SFD,
    "b_dense on denoising_student": ALONE,
    "b_dense on progressive": [{"student with gradient": 1, "teacher": 2}],
    "b_dense on sfd": SFD,
    "rectified_flow": ALONE,
    "reflow": ALONE,
    "flow_distill": ALONE,
    "bezier": ALONE,
}


def in_this_process(function, *arguments):
    return function(*arguments)


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "apart", in_this_process)
        result = methods.measure(TINY, precisions=("32-true",))
        result["methods"] += methods.measure(TINY, {"sfd": methods.METHODS["sfd"]}, ("bf16-mixed",))["methods"]
    return result


def test_every_method_and_host_is_measured():
    options = [option for options in methods.METHODS.values() for option in options]
    for path in (ROOT / "conf" / "method").rglob("*.yaml"):
        group = "method" if path.parent.name == "method" else "host"
        assert f"{group}={path.stem}" in options


def test_turns_are_told_apart_by_their_evaluations(measured):
    assert {entry["method"] for entry in measured["methods"]} == set(EVALUATIONS)
    for entry in measured["methods"]:
        turns = entry["turns"]
        assert [Counter(turn["evaluations"]) for turn in turns] == list(map(Counter, EVALUATIONS[entry["method"]]))
        assert_spread(entry["seconds_per_step"], TINY.cycle_rounds)
        for turn in turns:
            assert_spread(turn["seconds"], 2 * TINY.cycle_rounds // len(turns))
        mean = sum((Counter(turn["evaluations"]) for turn in turns), Counter())
        assert entry["evaluations_per_image"] == {name: count / len(turns) for name, count in mean.items()}
        assert 0.1 < entry["peak_gib"] < 100


def test_wrong_figures_of_a_plan_are_noticed(monkeypatch):
    monkeypatch.setattr(ProgressiveDistillation, "evaluations", {"student": 1.0})
    with pytest.raises(
        RuntimeError, match="progressive makes 3 network evaluations per image, but .* sum to 1: correct"
    ):
        methods.measure_one(TINY, "progressive", methods.METHODS["progressive"], "32-true")


def test_it_is_printed_here_and_in_the_readme(monkeypatch, capsys, measured, tmp_path):
    result = {**measured, "methods": [*measured["methods"], {"method": "sfd", "precision": "64-true", "killed": True}]}
    monkeypatch.setitem(run.PARTS, "methods", lambda: {**result, "fastgen_dmd2": methods.FASTGEN})
    run.main(["--only", "methods"])
    printed = capsys.readouterr().out
    seconds = [
        turn["seconds"]["median"]
        for turn in next(e for e in result["methods"] if e["method"] == "diff_instruct")["turns"]
    ]
    for words in (
        "a training step of each method, digits, tiny, random weights",
        "cpu, batch 4, ",
        "student* 1, teacher 8\n",
        "fake* 1, student 1\n",
        "  sfd                          64-true    killed: out of memory?\n",
        "2.82 s in a turn of the fake score and 3.71 s in one of the generator, 3 s at 4 to 1;",
        "with its GAN 3.4 to 3.6 s and 3.7 GiB.",
        f"The same mix of diff_instruct's turns here, 32-true: {(4 * seconds[0] + seconds[1]) / 5:.3g} s.",
    ):
        assert words in printed
    path = tmp_path / "benchmarks-cpu.json"
    path.write_text(json.dumps({"methods": result}))
    assert methods.table(result) in section(path)


def test_a_process_of_its_own_and_one_that_is_killed():
    assert methods.apart(os.getppid) == os.getpid()
    assert methods.apart(os.abort) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the figure is getrusage's")
def test_peak_memory_is_what_was_held_at_once():
    def seen() -> bool:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        more = 100 << 20
        held = mmap.mmap(-1, more)  # not from what the allocator has kept of earlier tests
        np.frombuffer(held, np.uint8)[:] = 1
        return resident + more - (1 << 20) < peak_memory() < 1 << 40

    assert any(seen() for _ in range(5))  # the kernel may drop pages of files at any time
