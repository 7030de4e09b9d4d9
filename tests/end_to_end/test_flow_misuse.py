"""Options of flow methods that cannot be: one clear line each, before anything is sampled or written."""

import pytest
from end_to_end_tools import snapshot, train
from flow_runs import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that may stand in method.teachers, each with one thing that is odd."""
    path = tmp_path_factory.mktemp("flow_misuse")
    write_run(path / "runs/plain")
    write_run(path / "runs/half", finished=False)
    write_run(path / "runs/large", resolution=16, attn_resolutions=[8])
    write_run(path / "runs/unlabelled", conditional=False)
    write_run(path / "runs/classes", num_classes=3)
    write_run(path / "runs/cut")
    write_run(path / "runs/wide", model_channels=16)
    (path / "runs/cut/student.safetensors").write_bytes(b"cut short")
    write_run(path / "runs/misfit")
    for name in ("student.safetensors", "student.json"):
        (path / "runs/misfit" / name).write_bytes((path / "runs/wide" / name).read_bytes())
    return path


NEITHER = "is neither a file in conf/teacher nor a run folder"


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ("[digits_rf1,digits_rf9]", [f"method.teachers: digits_rf9 {NEITHER}"]),
        ("[digits_rf1,runs/nothing]", [f"method.teachers: runs/nothing {NEITHER}"]),
        ("[none]", [f"method.teachers: none {NEITHER}"]),
        ("[1,2]", [f"method.teachers: 1 {NEITHER}"]),
        ("digits_rf1", ["method.teachers=digits_rf1 must be a list", "'method.teachers=[digits_rf1,digits_rf2]'"]),
        ("3", ["method.teachers=3 must be a list"]),
        ("[]", ["method.teachers must name at least one teacher"]),
        ("[runs/half]", ["method.teachers: runs/half has no student.safetensors; finish that run first"]),
        ("[runs/cut]", ["runs/cut/student.safetensors has SHA-256 "]),
        ("[runs/misfit]", ["runs/misfit/student.safetensors does not fit this SongUNet"]),
        ("[runs/plain,runs/large]", ["plain has resolution=8, large 16", "must agree in size and classes"]),
        ("[runs/plain,runs/unlabelled]", ["plain has num_classes=10, unlabelled 0", "must agree in size and classes"]),
        ("[runs/plain,runs/classes]", ["plain has num_classes=10, classes 3"]),
        ("[runs/large]", ["the network has resolution=16, the data digits 8"]),
        ("[runs/unlabelled]", ["num_classes in use=0, the data digits 10"]),
    ],
)
def test_teachers_that_cannot_be(folder, teachers, message):
    before = snapshot(folder)
    chosen = ("method=bezier", "name=new", f"method.teachers={teachers}", "trainer.accelerator=cpu")
    train(folder, *chosen).refused("error: runs/new: ", *message)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # curves
        ("method.order=0", ["method.order must be an integer of at least 1, got 0"]),
        (
            "method.order=2 method.teachers=[runs/plain,runs/plain,runs/plain]",
            [
                "method.order=2 has 2 control points to weight, fewer than the 3 of method.teachers",
                "give method.weights",
            ],
        ),
        ("method.slot=line", ["method.slot must be one of endpoint, trajectory, linear, got 'line'"]),
        (
            "method.order=3 method.slot=[endpoint]",
            ["method.slot=['endpoint']", "the 2 inner control points of method.order=3"],
        ),
        ("method.order=3 method.slot=[endpoint,line]", ["method.slot must be one of", "got 'line'"]),
        ("method.weights=[[1,0],[0.5,0.6]]", ["method.weights", "control point 2 are [0.5, 0.6]", "sum to 1"]),
        ("method.weights=[[2,-1],[0,1]]", ["method.weights", "control point 1", "must not be negative"]),
        ("method.weights=[[1,0]]", ["method.weights=[[1, 0]] must be 2 rows (method.order) of 2 numbers"]),
        ("method.weights=[[1],[1]]", ["method.weights=[[1], [1]] must be 2 rows (method.order) of 2 numbers"]),
        ("method.final_weights=[[1,0],[0,2]]", ["method.final_weights", "control point 2 are [0.0, 2.0]"]),
        ("method.end_row=mean", ["method.end_row must be one of one_hot, average, got 'mean'"]),
        # stored states
        (
            "method.order=12 method.slot=trajectory",
            ["teacher plain has too few steps (10) to pass through the noise levels", "give it more"],
        ),
        ("method.slot=trajectory method.dtype=uint8", ["dtype=uint8 holds end points alone", "float16 or float32"]),
        ("method.pairs=0", ["pairs must be an integer of at least 1, got 0"]),
        # objectives
        ("method.prediction=0", ["method.prediction and method.drift are both zero"]),
        ("method.drift=-1", ["method.drift must not be negative, got -1"]),
        ("method.loss=lpips", ["LPIPS is for RGB images", "this data has 1x8x8", "choose another method.loss"]),
    ],
)
def test_curves_that_cannot_be(folder, options, message):
    before = snapshot(folder)
    chosen = ("method=bezier", "name=new", "method.teachers=[runs/plain,runs/plain]", "trainer.accelerator=cpu")
    train(folder, *chosen, *options.split()).refused("error: runs/new: ", *message)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method=flow_distill method.steps=2 method.loss=lpips", ["method.loss='lpips' compares images", "steps=1"]),
        ("method=flow_distill method.loss=lpips", ["LPIPS is for RGB images"]),
        ("method=flow_distill method.steps=0", ["method.steps must be an integer of at least 1, got 0"]),
        ("method=reflow method.loss=lpips", ["method.loss must be one of", "got 'lpips'"]),
        ("method=bezier data=cifar10", ["method.teachers", "no weights at", "weights/cifar10-rf1.safetensors"]),
        ("method=reflow teacher.weights=nothing.safetensors", ["no weights at", "method=rectified_flow"]),
        (
            "method=rectified_flow time_distributions.u_shaped.a=0 method.times=${time_distributions.u_shaped}",
            ["a positive a, got 0"],
        ),
    ],
)
def test_flows_that_cannot_be(folder, options, message):
    before = snapshot(folder)
    ended = train(folder, "name=new", "trainer.accelerator=cpu", *options.split())
    ended.refused("error: runs/new: ", *message)
    assert snapshot(folder) == before
