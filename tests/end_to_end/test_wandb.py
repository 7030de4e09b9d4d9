"""W&B without network: what an offline run holds, through kill and resume, and under W&B's own agent."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pytest
import wandb_tools
import yaml
from end_to_end_tools import ROOT, RUN, STUDENT, TINY, kill_at, read_csv, read_json, train, with_data
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.run.names import register_resolvers

SWEEP = ROOT / "conf/sweep/wandb.yaml"


def offline_runs(folder):
    return sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    """A run folder whose training was killed in step 8 and went on from step 6."""
    folder = with_data(finished, tmp_path_factory.mktemp("wandb"))
    options = (*STUDENT, "logger=wandb_offline", "logger.wandb.log_model=true", "logger.wandb.notes=a trial")
    step = "lightning_modules:DenoisingStudent.training_step"
    train(folder, *options, before=kill_at(step, 8)).killed()
    (folder / RUN / "id_before").write_text((folder / RUN / "wandb_id").read_text())
    train(folder, *options).ok()
    return folder / RUN


@pytest.mark.slow
def test_a_resumed_run_continues_its_curve(resumed):
    identity = (resumed / "wandb_id").read_text()
    assert identity == (resumed / "id_before").read_text()
    first, second = offline_runs(resumed)
    assert first.name.endswith(f"-{identity}")  # it is empty: wandb writes its files every ten seconds or so
    (run,) = wandb_tools.of_kind(second, "run")
    assert (run.run_id, run.resume) == (identity, True)
    # Counted from 0: those before the checkpoint at step 6 from metrics.csv.
    assert [row["trainer/global_step"] for row in wandb_tools.rows(second) if "loss/student" in row] == list(range(13))
    losses = [float(row["loss/student"]) for row in read_csv(resumed / "metrics.csv")]
    assert [row["loss/student"] for row in wandb_tools.history(second).values()] == losses
    (ended,) = wandb_tools.of_kind(second, "exit")
    assert ended.exit_code == 0


@pytest.mark.slow
def test_every_row_has_the_images_seen_which_is_the_axis_of_all(resumed):
    segment = offline_runs(resumed)[-1]
    assert wandb_tools.axes(segment)["*"] == "nimg"
    for row in wandb_tools.rows(segment):
        assert row["nimg"] == 16 * (row["trainer/global_step"] + 1)
    keys = {key for row in wandb_tools.rows(segment) for key in row}
    sections = {key.split("/")[0] for key in keys if "/" in key}
    assert sections == {"loss", "heldout", "fid_digits_20", "progress", "speed", "samples", "final", "trainer"}
    assert "epoch" not in keys


@pytest.mark.slow
def test_config_group_tags_and_notes_are_the_runs_own(resumed):
    (run,) = wandb_tools.of_kind(offline_runs(resumed)[-1], "run")
    assert (run.project, run.display_name, run.run_group, run.notes) == ("stillhouse", "run", "run", "a trial")
    assert sorted(run.tags) == ["denoising_student", "digits"]  # the teacher is called as the data
    config = wandb_tools.config(offline_runs(resumed)[-1])
    stored = yaml.safe_load((resumed / "config.yaml").read_text())
    assert {key: config[key] for key in stored} == stored


@pytest.mark.slow
def test_the_end_is_told_by_names_that_mean_one_thing(resumed):
    segment = offline_runs(resumed)[-1]
    summary = wandb_tools.summary(segment)
    final = {f"{r['metric']}_20/{r['subject']}@{r['nfe']}": r["mean"] for r in read_json(resumed / "metrics.json")}
    final["fid_digits_20/real"] = final.pop("fid_digits_20/real@0")
    assert {key: summary[key] for key in final} == pytest.approx(final)
    assert set(final) == {"fid_digits_20/teacher@3", "fid_digits_20/student@1", "fid_digits_20/real"}
    media = segment / "files/media"
    assert len(list((media / "images/samples").glob("student_*.png"))) == 2  # steps 10 and 13
    for name in ("samples", "interpolation", "curves"):
        (shown,) = (media / "images/final").glob(f"{name}_*.png")
        assert shown.read_bytes() == (resumed / f"{name}.png").read_bytes()
    (table,) = (media / "table/final").glob("metrics_*.table.json")
    content = json.loads(table.read_text())
    assert [row[:2] for row in content["data"]] == [["fid_digits", s] for s in ("teacher", "student", "real")]
    (table,) = (media / "table/final").glob("convergence_*.table.json")
    assert json.loads(table.read_text())["data"][0][0] == "denoising_student"


@pytest.mark.slow
def test_the_artifact_is_the_student_alone(resumed):
    found = wandb_tools.of_kind(offline_runs(resumed)[-1], "artifact")
    (artifact,) = [artifact for artifact in found if artifact.type != "run_table"]
    assert (artifact.type, list(artifact.aliases)) == ("model", ["latest"])
    assert artifact.name == f"run-{(resumed / 'wandb_id').read_text()}"
    (entry,) = artifact.manifest.contents
    assert (entry.path, Path(entry.local_path)) == ("student.safetensors", resumed / "student.safetensors")
    card = json.loads(artifact.metadata)
    assert card == json.loads((resumed / "student.json").read_text())
    assert card["sha256"] == hashlib.sha256((resumed / "student.safetensors").read_bytes()).hexdigest()
    uploaded = {path.suffix for segment in offline_runs(resumed) for path in segment.rglob("*") if path.is_file()}
    assert not uploaded & {".ckpt", ".safetensors", ".pt"}


def agent_command(**values) -> list[str]:
    """The arguments of train.py that W&B's agent would start it with, as its own code makes them."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEP.read_text())
    assert set(values) == set(sweep["parameters"])
    made = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    parts = {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
    parts |= {f"${{{key}}}": value for key, value in made.items()}
    command = [word for chunk in create_sweep_command(sweep["command"]) for word in parts.get(chunk, [chunk])]
    assert command[:3] == ["/usr/bin/env", "python", "train.py"]
    return command[3:]


VALUES = {"method.lr": 3.5e-05, "method.fake_lr_factor": 2.0, "seed": 100}


@pytest.mark.slow
def test_what_the_agent_runs_is_what_the_sweep_means():
    flag, *options = agent_command(**VALUES)
    assert flag == "-m"
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", options)
    assert (cfg.method.name, cfg.method.lr, cfg.method.fake_lr_factor, cfg.seed) == ("diff_instruct", 3.5e-05, 2.0, 100)
    assert cfg.logger.wandb.project == yaml.safe_load(SWEEP.read_text())["project"]
    (average,) = cfg.callbacks.ema.averages  # what the sweep minimises is logged under this name
    metric = f"fid_digits_{cfg.evaluation.training.num_samples // 1000}k/ema_{average.halflife_kimg}kimg"
    assert yaml.safe_load(SWEEP.read_text())["metric"] == {"name": metric, "goal": "minimize"}


def agent_environment(file):
    # As the agent sets it, but for WANDB_MODE.
    agent = {"WANDB_RUN_ID": "agents01", "WANDB_SWEEP_ID": "sweep001", "WANDB_SWEEP_PARAM_PATH": file}
    os.environ.update(agent | {"WANDB_MODE": "offline"})


@pytest.mark.slow
def test_a_run_of_the_agent_is_the_agents_run(finished, tmp_path):
    """Its id wins over the run's own, also later without the agent; a searched group keeps its name in the config."""
    with_data(finished, tmp_path)
    file = tmp_path / "params.yaml"
    file.write_text("wandb_version: 1\nmethod:\n  value: diff_instruct\nseed:\n  value: 100\n")
    cheap = OmegaConf.from_dotlist([option for option in TINY if option != "name=run"])
    local = tmp_path / "conf/local/default.yaml"
    local.parent.mkdir(parents=True)
    local.write_text(f"# @package _global_\n{OmegaConf.to_yaml(cheap)}")
    options = ("--config-dir=conf", *agent_command(**VALUES))
    train(tmp_path, *options, before=partial(agent_environment, str(file))).ok()
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert folder.name.startswith(
        "diff_instruct-digits-seed100-logger-wandb-method.fake_lr_factor-2.0-method.lr-3.5e-05"
    )
    assert (folder / "wandb_id").read_text() == "agents01"
    (segment,) = offline_runs(folder)
    (run,) = wandb_tools.of_kind(segment, "run")
    assert (run.run_id, run.sweep_id) == ("agents01", "sweep001")
    config = wandb_tools.config(segment)
    assert (config["method"], config["method_options"]["lr"]) == ("diff_instruct", 3.5e-05)
    assert (folder / "metrics.json").exists()
