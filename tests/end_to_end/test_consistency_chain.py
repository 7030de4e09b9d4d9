"""Consistency models as the beginning of others, from the command line: CMT, then ECT, then TCM; and what is refused."""

import pytest
from end_to_end_tools import TINY, read_csv, read_json, train

from stillhouse.checkpoints import read_card

OPTIONS = [option for option in TINY if not option.startswith(("name=", "teacher."))]
FIRST = ("teacher.weights=null", "teacher.network.model_channels=8", "teacher.steps=2")
STORED = ("method.pairs=64", "method.held_out=16", "method.dtype=float32", "trainer.validate_every_n_steps=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the runs cmt and plain, of a consistency model and of a diffusion model."""
    folder = tmp_path_factory.mktemp("chain")
    train(folder, *OPTIONS, *FIRST, *STORED, "method=cmt", "name=cmt").ok()
    return folder


@pytest.mark.slow
def test_a_chain_of_consistency_models(folder):
    """The network begins as the one before; its run is measured with one evaluation, and says how it was sampled."""
    train(folder, *OPTIONS, "method=ect", "teacher=runs/cmt", "name=ect", "method.stage_kimg=null").ok()
    train(folder, *OPTIONS, "method=tcm", "teacher=runs/ect", "name=tcm").ok()
    values = {}
    for name in ("cmt", "ect", "tcm"):
        card = read_card(folder / "runs" / name / "student.safetensors")
        assert card["sampling"]["solver"] == "renoising"
        assert card["sampling"]["sigmas"] == pytest.approx([80.0, 0.0])
        records = {record["subject"]: record for record in read_json(folder / "runs" / name / "metrics.json")}
        values[name] = {subject: record["values"] for subject, record in records.items()}
        assert name == "cmt" or records["teacher"]["nfe"] == 1
    assert values["ect"]["teacher"] == values["cmt"]["student"]
    assert values["tcm"]["teacher"] == values["ect"]["student"]
    rows = read_csv(folder / "runs/tcm/metrics.csv")
    assert all(float(row["loss/boundary"]) >= 0 for row in rows if row["loss/student"])


@pytest.mark.slow
def test_a_distilled_consistency_model_keeps_its_boundary(folder):
    train(folder, *OPTIONS, *FIRST, "method=consistency_distillation", "name=cd", "method.sigma_min=0.01").ok()
    train(folder, *OPTIONS, "method=tcm", "teacher=runs/cd", "name=after").ok()
    card = read_card(folder / "runs/after/student.safetensors")
    assert card["preconditioning"]["name"] == "Consistency"
    assert card["preconditioning"]["sigma_min"] == 0.01


@pytest.mark.slow
def test_a_teacher_of_the_wrong_kind_is_refused_in_a_line(folder):
    train(folder, *OPTIONS, "method=tcm", "name=no").refused(
        "method=tcm goes on from a finished consistency model, and teacher digits is a diffusion model",
        "teacher=runs/NAME",
    )
    for options in (("method=diff_instruct",), ("method=ect", "method.teacher_step=heun"), ("method=sfd",)):
        train(folder, *OPTIONS, *options, "teacher=runs/cmt", "name=no").refused(
            "learns from the estimates of a diffusion model, and teacher cmt is a consistency model"
        )
