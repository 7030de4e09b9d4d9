"""What a command names that conf/ does not have: one line with the nearest that it has, before anything is begun."""

import os

import pytest
from end_to_end_tools import evaluate, run, train

from launch.command_line import nearest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # options
        ("method.los=l1", ["no option method.los; did you mean method.loss?"]),
        ("trainer.devces=2", ["no option trainer.devces; did you mean trainer.devices?", "+trainer.devces="]),
        ("teacher.network.model_chanels=3", ["did you mean teacher.network.model_channels"]),
        ("lr=1", ["no option lr; did you mean method.lr?"]),
        ("methd=sfd", ["no option methd; did you mean method"]),
        ("method/hst=sfd", ["no option method/hst"]),
        ("~method.parrs", ["no option method.parrs; did you mean method.pairs?"]),
        ("zzz=1", ["no option zzz; --cfg job shows all options"]),
        ("-m method.los=l1,l2", ["error: sweep: ", "did you mean method.loss?"]),
        # choices
        ("method=denoising_studnet", ["method=denoising_studnet is not among conf/method; did you mean denoising_student?"]),
        ("data=digist", ["data=digist is not among conf/data; did you mean digits?"]),
        ("logger=none", ["choose logger=NAME: csv, default, wandb, wandb_offline"]),
        ("method=b_dense host=nonsense", ["host=nonsense", "denoising_student, progressive, sfd"]),
        ("-m data=digist,digits", ["error: sweep: ", "did you mean digits?"]),
        # of groups that may be empty, which Hydra passes over
        ("recipe=sfd_digitz", ["recipe=sfd_digitz is not among conf/recipe; did you mean sfd_digits"]),
        ("shrink=foo", ["shrink=foo is not among conf/shrink; choose shrink=NAME: debug"]),
        # none at all
        ("teacher=none", ["method=denoising_student needs a teacher", "teacher=NAME"]),
        ("teacher=none method=pretrain", ["method=pretrain needs a teacher, or the network of one", "teacher=NAME"]),
        ("~teacher", ["needs a teacher", "teacher=NAME"]),
        ("method.teacher=null", ["needs a teacher", "teacher=NAME"]),
        ("data=null", ["data can't be left out", "digits"]),
        ("~data", ["data can't be left out", "digits"]),
        ("logger=null", ["logger can't be left out; choose logger=NAME: csv, default"]),
        ("~callbacks", ["callbacks is missing: train.py needs it"]),
        ("recipe=null", ["say ~recipe to leave it out"]),
        # no options
        ("data", ["'data' can't be read", "say KEY=VALUE"]),
        ("method.loss=[a", ["'method.loss=[a' can't be read"]),
        ("method.lr=1,2", ["method.lr=1,2", "add --multirun"]),
        ("--config-dir=nowhere", ["nowhere' not found"]),
    ],
)  # fmt: skip
def test_training(tmp_path, options, message):
    train(tmp_path, *options.split()).refused(*message)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".out", ".err")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("teacher=digist", ["teacher=digist is not among conf/teacher; did you mean digits"]),
        ("teacher=digits data=digist", ["data=digist is not among conf/data; did you mean digits?"]),
        ("num_sample=3", ["no option num_sample; did you mean num_samples"]),
        ("runs=runs/a1", ["no option runs; did you mean run?"]),
    ],
)
def test_evaluation(tmp_path, options, message):
    evaluate(tmp_path, *options.split()).refused(*message)


@pytest.mark.parametrize("place", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_a_data_set_derived_from_another_is_found_by_its_teacher(tmp_path, place):
    """With an evaluation of its own, which its data config overrides."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my_own.yaml").write_text(
        "defaults: [image_folder, {override /evaluation@_global_.evaluation: pixels}, _self_]\npath: mine\nresolution: 16"
    )
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "my_own.yaml").write_text("defaults: [image_folder, _self_]\nweights: null")
    message = "no mine16 images: neither data/mine16 nor mine exists"
    evaluate(tmp_path, place.format(tmp_path), "teacher=my_own").refused(message)
    train(tmp_path, place.format(tmp_path), "data=my_own", "method=pretrain").refused(message)


def whole_traces() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"


def test_the_whole_trace_on_request(tmp_path):
    ended = run(tmp_path, "train.py", "method.los=l1", before=whole_traces)
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert not ended.errors


def test_a_recipe_that_a_run_takes_by_itself_is_said(tmp_path):
    assert "recipe=sfd_digits, " in run(tmp_path, "train.py", "method=sfd", "plan=true").ok().out
    assert "recipe=" not in run(tmp_path, "train.py", "method=sfd", "~recipe", "plan=true").ok().out


def test_the_nearest_options():
    names = ["method", "method.loss", "method.lr", "teacher.steps", "method.steps", "trainer.devices"]
    assert nearest("method.lss", names) == ["method.loss"]
    assert nearest("steps", names) == ["method.steps", "teacher.steps"]
    assert nearest("mehtod.steps", names) == ["method.steps", "teacher.steps"]
    assert nearest("nothing", names) == []
