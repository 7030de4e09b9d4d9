"""Two programs are measured in turns, and what is compared is the same update of the same network."""

import json
import sys
from itertools import count, cycle, pairwise
from types import SimpleNamespace

import pytest

from benchmarks import diff_instruct_updates, fastgen
from benchmarks.cases import Case
from benchmarks.run import table
from benchmarks.turns import Program
from results.pages import section

PROGRAM = """
import sys, time
from benchmarks.turns import Turns
turns = Turns("cpu", 1)
print("not an answer")
turns.ready(parameters=100)
for kind in ("fake", "generator") * 2:
    begun = time.monotonic()
    with open(sys.argv[1], "a") as log:
        print(sys.argv[2], begun, time.monotonic(), file=log)
    turns.made(kind)
sys.exit(3)
"""


class Stub:
    """A program whose updates take the seconds that it is given."""

    def __init__(self, seconds, updates=("fake", "generator"), parameters=100):
        self.name, self.parameters = "stub", parameters
        self.made = (
            {"update": u, "seconds": s, "peak_gib": 1.0} for u, s in zip(cycle(updates), seconds, strict=False)
        )

    def facts(self):
        return {"parameters": self.parameters, "torch": "2"}

    def turn(self):
        return next(self.made)


@pytest.mark.slow
def test_programs_work_one_at_a_time(tmp_path):
    log = tmp_path / "log"
    commands = {name: [sys.executable, "-c", PROGRAM, str(log), name] for name in ("a", "b")}
    with Program("a", commands["a"]) as a, Program("b", commands["b"]) as b:
        figures = fastgen.measure(a, b, rounds=1)
        with pytest.raises(RuntimeError, match="a has ended with exit code 3"):
            a.turn()
    turns = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, *_ in turns] == ["a", "b"] * 4
    assert all(float(before[2]) <= float(after[1]) for before, after in pairwise(turns))
    assert figures["beside_fastgen"]["fake"]["ours"]["repeats"] == 1


def test_the_ratio_of_the_mix_is_that_of_each_round(tmp_path):
    theirs, ours = Stub([9, 9, 2, 4, 2, 12]), Stub([9, 9, 1, 1, 3, 18])
    figures = fastgen.measure(theirs, ours, rounds=2)
    found = figures["beside_fastgen"]
    assert found["fake"]["ratio"] == {"median": 1.0, "min": 0.5, "max": 1.5, "repeats": 2}
    assert found["mix"]["fastgen"]["min"] == pytest.approx((4 * 2 + 4) / 5)
    assert (found["mix"]["ratio"]["min"], found["mix"]["ratio"]["max"]) == (pytest.approx(5 / 12), pytest.approx(1.5))
    conditions = {
        "device": "cpu",
        "threads": 1,
        "batch_size": 4,
        "fastgen": "34f30e8b",
        "options": ["a=1"],
        "title": "T",
    }
    path = tmp_path / "benchmarks-machine.json"
    path.write_text(json.dumps({"fastgen": conditions | figures}))
    text = table(json.loads(path.read_text())["fastgen"])
    assert "FastGen 34f30e8\n" in text
    assert text.endswith("Ours with a=1")
    assert "fake-score update     2 (2 .. 2)              2 (1 .. 3)              1 (0.5 .. 1.5)" in text
    assert text in section(path)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (Stub(count(), ("generator", "fake")), "made the update 'generator' where 'fake' was due"),
        (Stub(count(), parameters=101), "not the same network"),
    ],
)
def test_what_is_not_the_same_is_refused(ours, message):
    with pytest.raises(RuntimeError, match=message):
        fastgen.measure(Stub(count()), ours, rounds=1)


def test_a_folder_without_fastgen_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        fastgen.main(["--fastgen", str(tmp_path)])
    assert ended.value.code == 2
    assert "is no checkout of FastGen" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("gan", [(), (diff_instruct_updates._GAN,)], ids=["no gan", "gan"])
def test_our_updates_are_the_trainers(gan):
    case = Case("digits", ("data=digits", "~recipe", "batch_size=4", "teacher.network.model_channels=8"))
    made = []

    def turn(kind):
        made.append(kind)
        if len(made) == 4:
            raise SystemExit

    turns = SimpleNamespace(ready=lambda **facts: None, made=turn)
    options = ["teacher.weights=null", "teacher.sha256=null", "trainer.accelerator=cpu", *gan]
    with pytest.raises(SystemExit):
        diff_instruct_updates.train(turns, options, case)
    assert made == ["fake", "generator"] * 2
