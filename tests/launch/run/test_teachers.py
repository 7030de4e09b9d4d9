"""Names in method.teachers to configs of teachers."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from hydra_plugins.run_folders import RunFolders
from launch.run.build import build, check_fit
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from launch.run.teachers import expand_teachers
from stillhouse.checkpoints import read_card, save_weights

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture(autouse=True)
def _conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def expanded(*teachers, data="digits"):
    cfg = compose("config", ["method=pretrain", f"data={data}"])
    OmegaConf.set_struct(cfg, False)
    cfg.method.teachers = list(teachers)
    expand_teachers(cfg)
    return cfg.method.teachers


def write_run(name, method, *, finished=True):
    """A run folder whose student has random weights."""
    cfg = compose("config", ["method=pretrain", "teacher.network.model_channels=8"])
    teacher = OmegaConf.to_container(cfg.teacher, resolve=True)
    path = Path("runs") / name
    path.mkdir(parents=True, exist_ok=True)
    OmegaConf.save({"method": method(teacher)}, path / "config.yaml")
    network = build(cfg.teacher.network)
    if finished:
        save_weights(path / "student.safetensors", network.state_dict(), {"licence": "own"})
    return network.state_dict()


def test_files_of_conf_teacher_read_the_runs_data():
    first, last = expanded("digits_rf1", "digits_rf2")
    assert (first.name, last.name) == ("digits_rf1", "digits_rf2")
    assert (first.network.resolution, last.network.num_classes) == (8, 10)
    (wide,) = expanded("cifar10_rf1", data="cifar10")
    assert (wide.network.resolution, wide.network.in_channels) == (32, 3)


@pytest.mark.parametrize(
    "method", [lambda teacher: {"teacher": teacher}, lambda teacher: {"teachers": [{"name": "first"}, teacher]}]
)
def test_a_run_is_a_teacher_of_its_students_weights(method):
    state = write_run("tiny", method)
    (config,) = expanded("runs/tiny")
    assert (config.name, config.weights) == ("tiny", "runs/tiny/student.safetensors")
    teacher = build(config)
    assert all(torch.equal(value, state[key]) for key, value in teacher.denoiser.network.state_dict().items())
    Path(config.weights).write_bytes(b"cut short")
    with pytest.raises(InstantiationException, match=rf"{config.weights} has SHA-256 .*, expected {config.sha256}"):
        build(config)


def test_teacher_and_data_of_a_run_are_choices_of_their_groups(monkeypatch):
    write_run("deep/tiny", lambda teacher: {"teacher": teacher})
    stored = RunFolder("runs/deep/tiny").stored_config()
    OmegaConf.save({**stored, "data": {"name": "own"}, "evaluation": {"blocks": 7}}, "runs/deep/tiny/config.yaml")
    cfg = compose("config", ["teacher=runs/deep/tiny", "teacher.steps=12"])
    assert (cfg.teacher.name, cfg.teacher.steps, cfg.teacher.network.model_channels) == ("tiny", 12, 8)
    assert cfg.teacher.sha256 == read_card("runs/deep/tiny/student.safetensors")["sha256"]
    cfg = compose("evaluate", ["task=teacher", f"teacher={Path('runs/deep/tiny').absolute()}", "data=runs/deep/tiny"])
    assert (cfg.teacher.name, cfg.data, cfg.evaluation) == ("tiny", {"name": "own"}, {"blocks": 7})
    assert "teacher=runs/tiny" not in RunFolders("", "runs://").list("teacher", None)
    monkeypatch.setenv("COMP_LINE", "python train.py teacher=")
    assert RunFolders("", "runs://").list("teacher", None) == ["runs/deep/tiny"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("teacher=runs/nothing", r"there is no run \(no runs/nothing/config.yaml\); give a folder that train.py made"),
        ("data=runs/nothing", r"data=runs/nothing: there is no run"),
        ("teacher=runs/odd", r"has no method.teacher with a network"),
        ("teacher=runs/torn", r"runs/torn/config.yaml can't be read"),
    ],
)
def test_what_is_no_run_is_refused(option, message):
    for name, text in (("odd", "method: {name: own}"), ("torn", "method: [")):
        Path(f"runs/{name}").mkdir(parents=True)
        Path(f"runs/{name}/config.yaml").write_text(text)
        save_weights(f"runs/{name}/student.safetensors", {}, {})
    with pytest.raises(ValueError, match=message):
        compose("config", [option])


def test_a_run_of_an_earlier_revision_is_a_teacher_by_todays_names():
    write_run("old", lambda teacher: {"teacher": teacher})
    file = Path("runs/old/config.yaml")
    file.write_text(file.read_text().replace("stillhouse.", ""))
    cfg = compose("config", ["teacher=runs/old"])
    assert cfg.teacher._target_ == "stillhouse.diffusion.teacher.Teacher"
    build(cfg.teacher)


def test_configs_stay_and_methods_without_a_list_are_left_alone():
    (config,) = expanded({"name": "own", "steps": 3})
    assert config == {"name": "own", "steps": 3}
    cfg = compose("config", ["method=pretrain"])
    expand_teachers(cfg)
    assert "teachers" not in cfg.method


def test_what_names_no_teacher_is_refused():
    cfg = compose("config", ["method=pretrain"])
    OmegaConf.set_struct(cfg, False)
    for name in ("digits_rf9", "none", "", 3, None, ["digits"]):
        cfg.method.teachers = ["digits_rf1", name]
        with pytest.raises(ValueError, match=r"method.teachers: .* is neither a file in conf/teacher nor a run folder"):
            expand_teachers(cfg)


@pytest.mark.parametrize("teachers", ["digits_rf1", 3])
def test_what_is_no_list_is_refused(teachers):
    cfg = OmegaConf.create({"method": {"teachers": teachers}})
    with pytest.raises(ValueError, match=rf"method.teachers={teachers} must be a list, such as 'method.teachers=\["):
        expand_teachers(cfg)


def test_a_run_without_a_student_is_refused():
    write_run("half", lambda teacher: {"teacher": teacher}, finished=False)
    with pytest.raises(
        FileNotFoundError, match=r"runs/half is no teacher yet, .*no student.safetensors; finish that run"
    ):
        expanded("runs/half")


def test_a_student_that_has_seen_all_labels_is_not_guided_by_itself():
    """2-RF of the digits, and a run whose card says so; one whose card says nothing is what its network's config says."""
    write_run("tiny", lambda teacher: {"teacher": teacher})
    weights = Path("runs/tiny/student.safetensors")
    reflowed, hiding = expanded("digits_rf2", "runs/tiny")
    save_weights(weights, load_file(weights), {"label_dropout": 0.0}, replace=True)
    (sighted,) = expanded("runs/tiny")
    shares = [config.network.label_dropout for config in (reflowed, hiding, sighted)]
    assert shares == [0.0, 0.1, 0.0]
    with pytest.raises(
        InstantiationException, match=r"teacher.guidance=1.5 .* tiny was trained to see all labels .*teacher.guide="
    ):
        build(OmegaConf.merge(sighted, {"guidance": 1.5}))
    reflowed.weights = str(CONF.parent / reflowed.weights)
    state = build(reflowed).hash
    reflowed.network.label_dropout = 0.1
    assert build(reflowed).hash == state


def test_a_student_of_fewer_evaluations_is_no_teacher():
    write_run("tiny", lambda teacher: {"teacher": teacher})
    weights = Path("runs/tiny/student.safetensors")
    state = load_file(weights)
    save_weights(weights, state, {"metrics": {"fid_digits/student": {"nfe": 19}}}, replace=True)
    (config,) = expanded("runs/tiny")
    assert config.sha256 == read_card(weights)["sha256"]
    save_weights(weights, state, {"metrics": {"fid_digits/student": {"nfe": 1}}}, replace=True)
    with pytest.raises(
        ValueError, match="was distilled into 1 network evaluations and is no teacher to be sampled in 10 steps"
    ):
        expanded("runs/tiny")


def test_a_method_without_a_teacher_says_what_it_needs():
    cfg = compose("config", ["method=pretrain", "teacher=none"])
    needs = "^method=pretrain needs a teacher, or the network of one, .* say teacher=NAME"
    with pytest.raises(ValueError, match=needs):
        expand_teachers(cfg)
    with open_dict(cfg):  # as ~teacher does
        del cfg.teacher
    with pytest.raises(ValueError, match=needs):
        expand_teachers(cfg)


def test_a_teacher_that_the_method_would_not_see_is_refused():
    cfg = compose("config", ["method=bezier", "teacher=digits_rf1"])
    with pytest.raises(ValueError, match="teacher=digits_rf1 has no effect here: name the teachers in method.teachers"):
        expand_teachers(cfg)
    expand_teachers(compose("config", ["method=bezier"]))


def test_a_guide_is_named_as_teachers_are_and_no_guidance_leaves_no_trace():
    plain = compose("config", ["method=sfd"])
    expand_teachers(plain)
    assert not {"guidance", "guidance_interval", "guide"} & set(plain.teacher)
    write_run("weak", lambda teacher: {"teacher": {**teacher, "guidance": 3.0, "guide": {"name": "other"}}})
    for name, guide in (("runs/weak", "weak"), ("digits", "digits")):
        cfg = compose("config", ["method=sfd", "teacher.guidance=1.5", "teacher.weights=null", f"teacher.guide={name}"])
        expand_teachers(cfg)
        assert (cfg.method.teacher.guidance, cfg.method.teacher.guide.name) == (1.5, guide)
        assert not {"guidance", "guide"} & set(cfg.teacher.guide)  # a student's images need no guide
        teacher = build(cfg.method.teacher)
        assert (teacher.guidance_name, teacher.nfe()) == (f"guidance 1.5 by {guide}", 38)
    with pytest.raises(ValueError, match="teacher.guide: digits9 is neither a file in conf/teacher nor a run folder"):
        expand_teachers(compose("config", ["method=sfd", "teacher.guide=digits9"]))


def test_a_guidance_is_that_of_each_teacher_in_a_list():
    cfg = compose("config", ["method=bezier", "method.teachers=[digits_rf1,digits_rf1]", "teacher.guidance=1.5"])
    expand_teachers(cfg)
    assert [teacher.guidance for teacher in cfg.method.teachers] == [1.5, 1.5]
    assert all(build(teacher).guided for teacher in cfg.method.teachers)


def test_a_guidance_that_a_method_would_not_see_is_refused():
    def built(*options):
        cfg = compose("config", [*options, "teacher.guidance=2", "teacher.weights=null"])
        expand_teachers(cfg)
        check_fit(build(cfg.method), build(cfg.data))

    for method in ("pretrain", "ect"):
        with pytest.raises(ValueError, match=f"method={method} does not learn from .*: leave teacher.guidance out"):
            built(f"method={method}")
    built("method=ect", "method.teacher_step=heun")
