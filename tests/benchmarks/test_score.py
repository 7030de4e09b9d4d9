"""The benchmark of score distillation: its counts, its floor and what it prints; not how fast anything is."""

import json
from dataclasses import replace

import pytest
import torch
from test_benchmarks import TINY, assert_spread

from benchmarks import run, score
from lightning_modules import DiffInstruct
from results.pages import section

TINY_SCORE = replace(TINY, cycles=2, cycle_rounds=2)


@pytest.fixture(scope="module")
def measured():
    return score.measure((TINY_SCORE,))


def test_each_turn_and_its_floor_are_measured_in_both_precisions(measured):
    assert [part["precision"] for part in measured["parts"]] == ["32-true", "bf16-mixed"]
    for part in measured["parts"]:
        assert part["batch_size"] == 4
        for turns in ("fake", "generator", "cycle", "both"):
            for key in ("seconds", "evaluation_seconds", "floor_seconds"):
                assert_spread(part[f"{turns}_{key}"], TINY_SCORE.cycle_rounds)
            assert_spread(part[f"{turns}_over_floor"], TINY_SCORE.cycle_rounds, positive=False)
            assert part[f"{turns}_floor_seconds"]["min"] > part[f"{turns}_evaluation_seconds"]["min"]
        alternating, both = part["training_images_per_second"], part["both_training_images_per_second"]
        assert alternating["max"] == pytest.approx(2 * 4 / part["cycle_seconds"]["min"])
        assert both["max"] == pytest.approx(4 / part["both_seconds"]["min"])


def test_every_precision_has_its_table_here_and_in_the_readme(measured, tmp_path):
    text = run.table(measured)
    assert text.count("turn over that floor") == 2 * 3
    for words in (
        "Diff-Instruct in bf16-mixed, digits, as in conf/",
        "batch 4, 0.31 M parameters, teacher random\n",
        "Counted in the fake score's turn: student, fake with gradient.",
        "Counted in the generator's turn: student with gradient, fake, teacher.",
        "Counted in a two_sided turn: student with gradient, fake with gradient, teacher.",
    ):
        assert words in text
    path = tmp_path / "benchmarks-cpu.json"
    path.write_text(json.dumps({"score": measured}))
    assert text in section(path)


def test_the_command_runs_it(monkeypatch, capsys, measured):
    monkeypatch.setitem(run.PARTS, "score", lambda: measured)
    run.main(["--only", "score"])
    assert run.table(measured) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("two_sided", "turn", "network", "message"),
    [
        (False, "generator_turn", "teacher", "'generator' evaluated .*teacher 2 times without gradient"),
        (False, "fake_turn", "teacher", "'fake' evaluated .*teacher 1 time without gradient"),
        (
            False,
            "fake_turn",
            "student",
            "'fake' evaluated .*student 1 time without gradient, student 1 time with gradient",
        ),
        (True, "both_turns", "fake", "'both' evaluated fake 2 times with gradient"),
    ],
)
def test_an_evaluation_beyond_the_floor_is_refused(monkeypatch, two_sided, turn, network, message):
    once = getattr(DiffInstruct, turn)

    def evaluates_more(method, random, labels, batch):
        z = random.latents
        denoiser = {"teacher": method.teacher.denoiser, "fake": method.fake, "student": method.student}[network]
        denoiser(z, torch.ones(len(z)), labels)
        return once(method, random, labels, batch)

    monkeypatch.setattr(DiffInstruct, turn, evaluates_more)
    with pytest.raises(RuntimeError, match=message):
        score.timed(TINY_SCORE, "32-true", two_sided)


def test_a_missing_evaluation_is_refused(monkeypatch):
    monkeypatch.setattr(DiffInstruct, "generator_turn", DiffInstruct.fake_turn)
    with pytest.raises(RuntimeError, match="its floor in benchmarks/floor.py is .*student 1 time with gradient"):
        score.timed(TINY_SCORE, "32-true", two_sided=False)
