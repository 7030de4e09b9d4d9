from pathlib import Path

import pytest
import wandb_tools
from quality_tools import REAL, students, teachers

from callbacks import wandb_logger
from callbacks.loggers.wandb_logger import final_metric_name


def made(folder, **options):
    return wandb_logger(str(folder), "stillhouse", 16, **options)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("disback-digits-seed0", "disback-digits"),
        ("disback-digits-seed12-method.lr-1e-05", "disback-digits-method.lr-1e-05"),
        ("run", "run"),
        ("reseed3ed", "reseed3ed"),
    ],
)
def test_seeds_of_one_configuration_are_a_group(tmp_path, name, group):
    options = made(tmp_path / name)._wandb_init
    assert (options["name"], options["group"]) == (name, group)
    assert made(tmp_path / name, group="table 2")._wandb_init["group"] == "table 2"


def test_the_id_is_kept_and_that_of_an_agent_wins(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = made(tmp_path).version
    assert first == (tmp_path / "wandb_id").read_text() == made(tmp_path).version
    assert made(tmp_path / "other").version != first
    monkeypatch.setenv("WANDB_RUN_ID", "agents01")
    assert made(tmp_path).version == "agents01"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert made(tmp_path).version == "agents01"  # the agent's run goes on


def test_final_names_say_metric_samples_subject_and_evaluations():
    records = [*teachers({19: 0.15}), *students({1: 0.5, 4: 0.3}), REAL]
    assert [final_metric_name(record) for record in records] == [
        "fid_digits_2k/teacher@19",
        "fid_digits_2k/student@1",
        "fid_digits_2k/student@4",
        "fid_digits_2k/real",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": ["paper", ""]}, r"logger.wandb.tags must be a list of words, such as \[paper,table2\]"),
        ({"entity": ""}, "logger.wandb.entity must not be empty"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **options)
    assert not (tmp_path / "wandb_id").exists()


def test_a_metric_needs_its_step(tmp_path):
    with pytest.raises(ValueError, match="a metric needs the step it belongs to"):
        made(tmp_path).log_metrics({"loss": 1.0})


# -- resumed runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def logged(logger, steps, before=lambda: None):
    """Log these steps and end the run; {step: keys} of its file, which may hold no step twice."""
    before()
    for step in steps:
        logger.log_metrics({"loss/student": 100.0 + step, "epoch": 0}, step)
        if step % 4 == 0:
            logger.log_metrics({"heldout/loss": 200.0 + step}, step)
    folder = Path(logger.experiment.dir).parent
    logger.close()
    wandb_tools.ended(folder)
    rows = [
        (row["trainer/global_step"], key, row[key]) for row in wandb_tools.rows(folder) for key in row if "/" in key
    ]
    found = {(step, key): value for step, key, value in rows if key in ("loss/student", "heldout/loss")}
    assert len(found) == sum(key in ("loss/student", "heldout/loss") for _, key, _ in rows)
    assert all(value == {"l": 100, "h": 200}[key[0]] + step for (step, key), value in found.items())
    return folder, set(found)


def table(folder, steps):
    """A metrics.csv of what `logged` logs."""
    held = [200.0 + step if step % 4 == 0 else "" for step in range(steps)]
    rows = [f"{step + 1},{16 * (step + 1)},{100.0 + step},0,{held[step]}" for step in range(steps)]
    (folder / "metrics.csv").write_text("\n".join(["step,nimg,loss/student,epoch,heldout/loss", *rows, ""]))


ALL = {(step, "loss/student") for step in range(13)} | {(step, "heldout/loss") for step in (0, 4, 8, 12)}


@pytest.mark.parametrize("cut", [0, 100, 1200], ids="{} bytes lost".format)
@pytest.mark.parametrize("checkpoint", [3, 9])
def test_a_resumed_run_sends_what_its_offline_files_lack_and_nothing_twice(tmp_path, offline, checkpoint, cut):
    """Killed after step 9 (the tenth), with the end of its file unwritten; resumed at a checkpoint before or at that step."""
    now, before = logged(made(tmp_path, offline=True), range(10))
    first = now.rename(now.with_name(f"offline-run-20200101_000000-{now.name.rpartition('-')[2]}"))  # a second ago
    (file,) = first.glob("run-*.wandb")
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut] if cut else file.read_bytes())
    kept = {(row["trainer/global_step"], key) for row in wandb_tools.rows(first) for key in row} & ALL
    assert (kept == before) == (cut < 1200)
    table(tmp_path, 10)
    _, after = logged(made(tmp_path, offline=True), range(checkpoint, 13))
    assert not kept & after
    assert kept | after == ALL


@pytest.mark.parametrize(("seen", "checkpoint"), [(0, 6), (4, 6), (5, 6), (9, 6)])
def test_a_run_that_is_resumed_online_goes_on_behind_what_its_summary_has(tmp_path, offline, seen, checkpoint):
    """W&B has the rows of so many steps; metrics.csv those of ten."""
    table(tmp_path, 10)
    logger = made(tmp_path)

    def handed():
        # Of the last of them the validation has not come.
        latest = {"nimg": 16 * seen, "loss/student": 99.0 + seen, "heldout/loss": 7.0}
        logger.experiment.summary.update(latest if seen else {})

    _, after = logged(logger, range(checkpoint, 13), handed)
    assert after == {(step, key) for step, key in ALL if step >= seen or (step, key) == (seen - 1, "heldout/loss")}


def test_a_run_that_is_resumed_in_a_validation_sends_the_row_of_its_step(tmp_path, offline):
    """metrics.csv has it, and it is never logged again."""
    table(tmp_path, 9)
    logger = made(tmp_path, offline=True)
    _, after = logged(logger, range(9, 13), lambda: logger.log_metrics({"heldout/loss": 208.0}, 8))
    assert after == ALL


def test_a_run_that_was_left_open_is_ended_before_the_next_one(tmp_path, monkeypatch):
    """wandb would log the next job of a sweep into it."""
    for name in ("WANDB_RUN_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    failed, following = (made(tmp_path / name, offline=True) for name in ("a", "b"))
    failed.log_metrics({"loss/student": 2.0, "epoch": 0}, step=0)
    following.log_metrics({"loss/student": 1.0}, step=1)
    assert following.experiment.id == following.version != failed.version
    following.close()
    for name, code, row in (("a", 1, {"loss/student": 2.0, "nimg": 16}), ("b", 0, {"loss/student": 1.0, "nimg": 32})):
        (segment,) = (tmp_path / name / "wandb").glob("offline-run-*")
        (logged,) = wandb_tools.rows(wandb_tools.ended(segment))
        assert {key: logged.get(key) for key in (*row, "epoch")} == row | {"epoch": None}
        (ended,) = wandb_tools.of_kind(segment, "exit")
        assert ended.exit_code == code
