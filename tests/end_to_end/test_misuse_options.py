"""Names that become paths, options that would lose the training, and what may not be built: refused, and nothing is written."""

import pytest
from end_to_end_tools import PRETRAIN, RUN, copied, evaluate, snapshot, train
from omegaconf import OmegaConf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Somebody's own config.yaml, in a folder of their own and where a run would go."""
    folder = tmp_path_factory.mktemp("options") / "here"
    for place in ("conf", "runs/foreign", "runs/empty"):
        (folder / place).mkdir(parents=True)
        (folder / place / "config.yaml").write_text("" if place.endswith("empty") else "defaults: [data: digits]\n")
    return folder


RUNS = "below runs/, not empty, without .."
BELOW_DATA = "must name one folder below data/"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("name=../conf", ["name='../conf' must name a folder", RUNS]),
        ("name=../../outside", ["name='../../outside' must name a folder", RUNS]),
        ("name=a/../../conf", ["name='a/../../conf' must name a folder", RUNS]),
        ("name=/tmp/elsewhere", ["name='/tmp/elsewhere' must name a folder", RUNS]),
        ("name=", ["name='' must name a folder", RUNS]),
        ("name=.", ["name='.' must name a folder", RUNS]),
        ("name=a//b", ["name='a//b' must name a folder", RUNS]),
        ("name=" + 256 * "a", ["at most 255 long"]),
        ("name=null", ["name=null: give text"]),
        ("name=2024", ["name=2024: give text"]),
        ("name=foreign", ["runs/foreign/config.yaml is not the config of a run", "restore or remove it"]),
        ("name=empty", ["runs/empty/config.yaml is not the config of a run (it is empty)"]),
        ("folder=elsewhere", ["folder is not an option: name=NAME makes it runs/NAME"]),
        ("data.name=../../x", ["data.name='../../x'", BELOW_DATA]),
        ("data.name=", ["data.name=''", BELOW_DATA]),
        ("teacher.name=../../x", ["teacher.name='../../x'", BELOW_DATA]),
        ("teacher.name=a/b", ["teacher.name='a/b'", BELOW_DATA]),
        # the training would be lost
        ("callbacks.checkpoints=null", ["callbacks.checkpoints=null would lose the training", "put it back"]),
        # of the program's own keys
        ("plan=no", ["plan=no: say true or false"]),
        ("+batchsize=7", ["batchsize is unknown: did you mean batch_size?"]),
        ("teacher=none", ["teacher"]),
        ("recipe=sfd_cifar10", ["recipe=sfd_cifar10 is for another method: method.steps is unknown to Pretrain"]),
        ("teacher.schedule.rho=0", ["rho must be positive, got 0"]),
        ("method._target_=shutil.copy", ["method._target_=shutil.copy is not built"]),
    ],
)
def test_train(folder, options, message):
    before = snapshot(folder.parent)
    train(folder, *PRETRAIN, *options.split()).refused(*message)
    assert snapshot(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == ["here"]


def test_a_run_below_a_folder_of_runs(tmp_path):
    train(tmp_path, *PRETRAIN, "name=tries/a", "plan=true").ok()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("check=no", "check=no: say true or false"),
        ("download=no", "download=no: say true or false"),
        ("seed=true", "seed=true: give a whole number"),
        ("num_samples=1e3", "num_samples=1000.0: give a whole number or null"),
        ("blocks=many", "blocks=many: give a whole number or null"),
        ("metrics=fid", "metrics=fid: give a list of texts or null"),
        ("solver=5", "solver=5: give text or null"),
        ("device=0", "device=0: give text"),
        ("data.conditional=no", "data.conditional=no: say true or false"),
        ("teacher.conditional=off", "teacher.conditional=off: say true or false"),
        ("teacher.schedule.rho=inf", "teacher.schedule.rho=inf: give a finite number"),
        ("+teacher.foo=1", "teacher.foo is unknown: Teacher takes name, "),
        ("evaluation.batch_size=yes", "evaluation.batch_size=yes: give a whole number"),
        ("teacher.name=../x", "teacher.name='../x' must name one folder"),
    ],
)
def test_evaluate(tmp_path, options, message):
    evaluate(tmp_path, "teacher=digits", "teacher.weights=null", options).refused("error: evaluate: ", message)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("target", ["shutil.copy", "pathlib.Path.touch", "launch.run.folder.shutil.copy"])
@pytest.mark.parametrize("part", ["method", "data", "evaluation.extractor", "method.teacher.network"])
def test_a_foreign_runs_config_runs_nothing(finished, tmp_path, target, part):
    copied(finished, tmp_path)
    config = OmegaConf.load(tmp_path / RUN / "config.yaml")
    node = {"_target_": target, "src": "runs/run/config.yaml", "dst": "copied", "self": "touched"}
    OmegaConf.update(config, part, node, merge=False, force_add=True)
    if part == "method":
        node["name"] = "denoising_student"
    OmegaConf.save(config, tmp_path / RUN / "config.yaml")
    before = snapshot(tmp_path)
    evaluate(tmp_path, f"run={RUN}", "device=cpu").refused(f"_target_={target}", "is not built")
    assert snapshot(tmp_path) == before
