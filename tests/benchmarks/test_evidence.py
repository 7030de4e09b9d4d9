"""The queue of the claims' runs with stand-in commands, their order, what is packed; and one claim of the digits, really run."""

import json
import subprocess
import tarfile

import pytest

from benchmarks.evidence.__main__ import arguments, main
from benchmarks.evidence.claims import CLAIMS, DATA
from benchmarks.evidence.jobs import jobs
from benchmarks.evidence.queue import STOPPED, Job, read_rows, run_queue
from benchmarks.gpu.stages import Budget
from benchmarks.gpu.worker import FAILED, PASSED
from results.__main__ import main as results_main
from results.claims import claim_rows
from results.trained import TrainedRuns
from stillhouse.file_locks import try_lock


def shell(name, script, *more, needs=()):
    return Job(name, tuple(("sh", "-c", each) for each in (script, *more)), needs)


def statuses(folder):
    return {name: row["status"] for name, row in read_rows(folder).items()}


def test_runs_go_in_order_and_after_those_that_they_need_and_an_error_is_a_row(tmp_path):
    order, said = tmp_path / "order", []

    def run(name, *more, needs=(), code=0):
        return shell(name, f"echo {name} >> {order}; exit {code}", *more, needs=needs)

    todo = [
        run("a"),
        shell("bad", "echo 'error: data=no is no choice'; echo more; exit 1"),
        run("of_bad", needs=("bad",)),
        run("b", f"echo b2 >> {order}", needs=("a",)),
        run("c"),
    ]
    run_queue(todo, tmp_path, Budget(60), 1, reserve=1, least=0, say=said.append)
    assert order.read_text().split() == ["a", "b", "b2", "c"]
    assert statuses(tmp_path) == {"a": PASSED, "bad": FAILED, "b": PASSED, "c": PASSED}
    assert read_rows(tmp_path)["bad"]["message"] == "exit code 1, error: data=no is no choice"
    assert "| of_bad | not reached |" in (tmp_path / "report.md").read_text()
    assert any("[2/5] bad failed: exit code 1" in line for line in said)

    # The same command again repeats nothing, and with retry what failed, and then what needs it.
    run_queue(todo, tmp_path, Budget(60), 1, reserve=1, least=0, say=said.append)
    assert len(order.read_text().split()) == 4
    worse = [shell("bad", "echo killed; exit 137") if job.name == "bad" else job for job in todo]
    run_queue(worse, tmp_path, Budget(60), 1, reserve=1, least=0, retry=True, say=said.append)
    assert read_rows(tmp_path)["bad"]["message"] == "exit code 137, killed"  # not the error of the first try
    mended = [run("bad") if job.name == "bad" else job for job in todo]
    run_queue(mended, tmp_path, Budget(60), 2, reserve=1, least=0, retry=True, say=said.append)
    assert order.read_text().split()[4:] == ["bad", "of_bad"]


def test_when_the_time_is_over_runs_are_stopped_and_go_on_in_the_next_call(tmp_path):
    saves = "trap 'echo saved > {0}/state; kill $!; exit 143' TERM; test -e {0}/state || {{ sleep 600 & wait; }}"
    todo = [
        shell("saves", saves.format(tmp_path)),
        shell("hangs", f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 600; done"),
        shell("later", "true"),
    ]
    run_queue(todo, tmp_path, Budget(2.5), 2, reserve=1.5, least=0, say=lambda line: None)
    assert statuses(tmp_path) == {"saves": STOPPED, "hangs": STOPPED}
    process = (tmp_path / "pid").read_text().strip()
    assert subprocess.run(["sh", "-c", f"kill -0 {process} 2>/dev/null"], check=False).returncode  # it has gone
    run_queue([*todo[::2]], tmp_path, Budget(60), 2, reserve=1, least=0, say=lambda line: None)
    assert statuses(tmp_path) == {"saves": PASSED, "hangs": STOPPED, "later": PASSED}


def test_every_claim_has_its_first_seed_before_any_second_one(tmp_path):
    names = [claim.name for claim in CLAIMS]
    for data in DATA:
        found = jobs(tmp_path, data, names, (0, 1), ("method.kimg=1",))
        assert len({job.name for job in found}) == len(found)
        seeds = [int(job.name[-1]) for job in found]
        assert seeds == sorted(seeds)
        for i, job in enumerate(found):
            assert {*job.needs} <= {earlier.name for earlier in found[:i]}
            assert not any("{" in word for command in job.commands for word in command)
            assert job.commands[0][-1] == "method.kimg=1"


def test_a_pack_has_the_small_files_of_finished_runs_and_the_weights_that_any_claim_still_needs(tmp_path):
    # Of ect's needs tcm has passed; of seed 1's reflow only some.
    finished = ["ect-seed0", "tcm-seed0", "reflow-seed1", "bezier-seed1", "flow_distill-rf1-seed1"]
    rows = dict.fromkeys(finished, PASSED) | {"sid-seed0": STOPPED}
    (tmp_path / "runs.json").write_text(
        json.dumps({"runs": [{"run": name, "status": status} for name, status in rows.items()]})
    )
    for run in rows:
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        for name in ("metrics.json", "student.safetensors", "checkpoints/last.ckpt"):
            (tmp_path / run / name).write_text(name)
    target = tmp_path / "small.tar.gz"
    for _ in range(2):  # the second time the first pack lies there
        main(
            [
                "--out",
                str(tmp_path),
                "--minutes",
                "0",
                "--only",
                "denoising_student",
                "--seeds",
                "5",
                "--pack",
                str(target),
            ]
        )
    with tarfile.open(target) as file:
        assert set(file.getnames()) == {
            "runs.json",
            "evidence.json",
            *(f"{name}/metrics.json" for name in finished),
            "reflow-seed1/student.safetensors",
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "disback,nothing"], "--only nothing: the claims are denoising_student, disback"),
        (["--seeds", "0;1"], "must be whole numbers"),
        (["--workers", "0"], "must be positive"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        arguments(["--out", str(tmp_path), *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_holds_runs_of_one_command(tmp_path):
    common = ["--out", str(tmp_path), "--minutes", "0", "--data", "digits"]
    main([*common, "--", "method.kimg=1"])
    with pytest.raises(SystemExit, match="choose another folder"):
        main(common)


def test_a_second_launch_over_a_folder_is_refused_until_the_first_one_ends(tmp_path):
    command = ["--out", str(tmp_path), "--minutes", "0"]
    held = try_lock(tmp_path / "lock")
    with pytest.raises(SystemExit, match=rf"error: --out {tmp_path} is in use by another launch: wait for its end, or"):
        main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    held.release()
    main(command)
    main(command)  # the first one has let go of it
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"error: .*{tmp_path}/file"):
        main(["--out", str(tmp_path / "file")])


@pytest.mark.slow
def test_a_claim_of_the_digits_is_trained_measured_packed_and_shown(tmp_path):
    out, target = tmp_path / "evidence", tmp_path / "small.tar.gz"
    shrunken = [
        "method.pairs=64",
        "method.held_out=64",
        "method.kimg=0.512",
        "batch_size=64",
        "trainer.accelerator=cpu",
    ]
    shrunken += ["evaluation.num_samples=20", "evaluation.training={num_samples: 20, every_kimg: 0.128}"]
    shrunken += [f"method.store={tmp_path}/pairs"]
    command = ["--out", str(out), "--data", "digits", "--only", "denoising_student", "--seeds", "0", "--workers", "1"]
    main([*command, "--minutes", "8", "--pack", str(target), "--", *shrunken])
    assert statuses(out) == {"denoising_student-seed0": PASSED}, (out / "report.md").read_text()
    with tarfile.open(target) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    assert not list((tmp_path / "unpacked").rglob("*.ckpt"))
    for folder in (out, tmp_path / "unpacked"):
        results_main(["claims", str(tmp_path / "claims.json"), str(folder)])
        (row,) = claim_rows(TrainedRuns.from_json(json.loads((tmp_path / "claims.json").read_text())["claims"]))
        assert "in 1 evaluation, the teacher" in row.measured
        assert " in 100: " in row.measured
        assert row.seeds == (0,)
