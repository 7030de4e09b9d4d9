import pytest
import wandb_tools
from quality_tools import REAL, students, teachers

from callbacks import wandb_logger
from callbacks.wandb_logger import final_name


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
    assert [final_name(record) for record in records] == [
        "fid_digits_2k/teacher@19",
        "fid_digits_2k/student@1",
        "fid_digits_2k/student@4",
        "fid_digits_2k/real",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": "paper"}, r"logger.wandb.tags must be a list of words, such as \[paper,table2\], got 'paper'"),
        ({"tags": [3]}, "logger.wandb.tags must be a list of words"),
        ({"log_model": "all"}, "logger.wandb.log_model must be true or false, got 'all'"),
        ({"offline": None}, "logger.wandb.offline must be true or false, got None"),
        ({"group": 3}, "logger.wandb.group must be a text, got 3"),
        ({"entity": ""}, "logger.wandb.entity must be a text, got ''"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **options)
    assert not (tmp_path / "wandb_id").exists()


def test_a_metric_needs_its_step(tmp_path):
    with pytest.raises(ValueError, match="a metric needs the step it belongs to"):
        made(tmp_path).log_metrics({"loss": 1.0})


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
        (logged,) = wandb_tools.rows(segment)
        assert {key: logged.get(key) for key in (*row, "epoch")} == row | {"epoch": None}
        (ended,) = wandb_tools.of_kind(segment, "exit")
        assert ended.exit_code == code
