import importlib

import pytest
from omegaconf import OmegaConf

from launch.run.folder import RunFolder, differences, identity
from stillhouse.metrics.records import Record, save_records

CONFIG = {"seed": 0, "method": {"lr": 1e-3, "betas": [0.9, 0.999]}}


def begun(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(CONFIG)
    folder.checkpoints.mkdir()
    folder.last.write_bytes(b"checkpoint")
    return folder


def test_the_config_of_a_run_is_written_once(tmp_path):
    folder = begun(tmp_path)
    before = folder.config.read_bytes()
    folder.check(CONFIG)
    folder.claim(CONFIG | {"seed": 5})
    assert folder.config.read_bytes() == before
    assert OmegaConf.to_container(folder.read_config()) == CONFIG


def test_lists_of_named_configs_differ_by_names_or_within():
    def teachers(*names, steps=10):
        return {"teachers": [{"name": name, "steps": steps, "weights": f"{name}.safetensors"} for name in names]}

    assert differences(teachers("a", "b"), teachers("a", "b")) == []
    assert differences(teachers("a", "b"), teachers("a", "c")) == [("teachers", "a,b", "a,c")]
    assert differences(teachers("a"), teachers("a", "c")) == [("teachers", "a", "a,c")]
    assert differences(teachers("a"), teachers("a", steps=5)) == [("teachers.0.steps", 10, 5)]


def test_a_changed_config_is_refused_with_both_values(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(ValueError, match=r"started with method.lr=0.001, but this command has method.lr=0.002; choose"):
        folder.check(CONFIG | {"method": {"lr": 2e-3, "betas": [0.9, 0.999]}})
    with pytest.raises(ValueError, match=r"seed=0, but this command has seed=1 \(also changed: method.betas, new\)"):
        folder.check({"seed": 1, "method": {"lr": 1e-3, "betas": [0.9, 0.99]}, "new": 3})


def test_a_run_from_before_an_option_goes_on_with_what_it_had_in_effect(tmp_path):
    folder = begun(tmp_path)
    folder.config.write_text(OmegaConf.to_yaml(CONFIG | {"evaluation": {"blocks": 3}, "data": {"name": "pictures"}}))
    data = {"name": "pictures", "depth": "refuse", "verify": True}
    folder.check(CONFIG | {"evaluation": {"blocks": 3, "labels": "uniform"}, "data": data})
    with pytest.raises(ValueError, match=r"started with evaluation.labels=None, but .*'data'; choose"):
        folder.check(CONFIG | {"evaluation": {"blocks": 3, "labels": "data"}, "data": data})


# As revision 0d82877 wrote them; how many branches and their weights were options of methods of their own.
OLD = {
    "seed": 0,
    "time_laws": {"start": {"_target_": "diffusion.time_laws.Start"}},
    "data": {"_target_": "datamodules.Planar", "law": "checkerboard"},
    "evaluation": {"extractor": {"_target_": "metrics.extractors.Points"}},
    "method": {
        "_target_": "lightning_modules.BDenseSFD",
        "weights": "uniform",
        "teacher": {
            "_target_": "diffusion.teacher.Teacher",
            "weights": "own.safetensors",
            "network": {"_target_": "networks.MLP"},
            "source": {"_target_": "networks.EDMPickle"},
        },
    },
}


def test_a_config_of_an_earlier_revision_names_what_is_here_today(tmp_path):
    folder = begun(tmp_path)
    folder.config.write_text(OmegaConf.to_yaml(OLD))
    config = folder.read_config()
    check_names(config)
    assert config.data.distribution == "checkerboard"
    assert (config.method.branch_weights, config.method.teacher.weights) == ("uniform", "own.safetensors")
    assert folder.stored_config() == OLD  # by which its checkpoints are known
    with pytest.raises(
        ValueError, match=r"begun by an earlier version, .*`git checkout 0d82877` can finish it, or choose"
    ):
        folder.check(folder.plain_config())
    folder.metrics.write_text("[]")
    folder.check(folder.plain_config())


def check_names(node):
    """Every target is a class or function of today."""
    for key, value in node.items():
        if key == "_target_":
            module, _, name = value.rpartition(".")
            assert hasattr(importlib.import_module(module), name), value
        elif OmegaConf.is_dict(value):
            check_names(value)


def logged(path):
    return {
        "name": path.name,
        "logger": {"csv": {"folder": str(path)}, "tensorboard": {"save_dir": f"{path}/tensorboard"}},
    }


def test_a_run_may_be_moved_with_the_folders_of_its_loggers_inside(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(CONFIG | logged(folder.path))
    folder.checkpoints.mkdir()
    folder.last.touch()
    moved = RunFolder(folder.path.rename(tmp_path / "moved"))
    moved.check(CONFIG | logged(moved.path))
    for other in (CONFIG | logged(tmp_path / "elsewhere"), CONFIG | logged(moved.path) | {"logger": {}}):
        with pytest.raises(ValueError, match="was started with logger.csv"):
            moved.check(other)


def test_a_checkpoint_is_known_by_the_config_that_its_run_was_begun_with(tmp_path):
    folder = RunFolder(tmp_path / "run")
    today = CONFIG | {"batch_size": 16, "method": CONFIG["method"] | {"branches": 1}}
    assert folder.checkpoint_owner(today, "sfd") == identity(today, "sfd")
    earlier = begun(tmp_path)  # before there were branches
    earlier.config.write_text(OmegaConf.to_yaml(CONFIG | {"batch_size": 16}))
    earlier.check(today)
    assert earlier.checkpoint_owner(today, "sfd") == identity(CONFIG | {"batch_size": 16}, "sfd")
    assert earlier.checkpoint_owner(today | {"batch_size": 8}, "sfd") == identity(CONFIG | {"batch_size": 8}, "sfd")


def test_a_run_begins_without_what_another_attempt_logged(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(CONFIG)
    written = [folder.path / name for name in ("metrics.csv", "tensorboard/events", "wandb_id", "rounds/2/metrics.csv")]
    others = [folder.path / name for name in ("notes.txt", "inner/config.yaml", "inner/metrics.csv")]
    for path in (*written, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the first attempt")
    folder.claim(CONFIG)
    assert all(path.exists() for path in (*written, *others))  # the same run: these go on
    folder.claim(CONFIG | {"seed": 1})
    assert [path.exists() for path in (*written, *others)] == [False] * len(written) + [True] * len(others)


def test_a_run_within_another_one_is_refused(tmp_path):
    outer = begun(tmp_path)
    for name in ("a", "checkpoints", "degradation/a"):
        with pytest.raises(ValueError, match=rf"{name} lies inside a run's folder, .*run; choose another name"):
            RunFolder(outer.path / name).check(CONFIG)


def test_a_folder_of_runs_is_no_run(tmp_path):
    inner = begun(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path} holds other runs, such as {inner.path}; choose another name"):
        RunFolder(tmp_path).check(CONFIG)


def test_a_folder_without_checkpoint_may_be_used_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check(CONFIG)
    folder.claim(CONFIG)
    folder.check({"seed": 1})
    folder.claim(CONFIG | {"seed": 1})
    assert folder.read_config().seed == 1


def test_a_run_that_could_not_be_written_is_refused_before_it_begins(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.config.mkdir(parents=True)
    with pytest.raises(OSError, match="^cannot write .*/run/config.yaml: it is a folder"):
        folder.check(CONFIG)
    folder.config.rmdir()
    folder.checkpoints.write_text("mine")
    with pytest.raises(OSError, match="^cannot write .*/run/checkpoints/last.ckpt: Not a directory"):
        folder.check(CONFIG)
    assert [path.name for path in folder.path.iterdir()] == ["checkpoints"]


def test_checkpoints_without_config_are_not_taken_over(tmp_path):
    folder = begun(tmp_path)
    folder.config.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no run \(no config.yaml\)"):
        folder.check(CONFIG)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", r"can't be read \(ParserError\)"),
        ("method: {a: !!binary aGk=}", r"can't be read \(TypeError\)"),
        ("- 1\n- 2", r"is not the config of a run \(it is a list\)"),
        ("", r"is not the config of a run \(it is empty\)"),
        ("name: x", r"is not the config of a run \(it names no method\)"),
        ("method: sfd", r"is not the config of a run \(it names no method\)"),
        ("method: {a: 1}\nseed: one", r"is not the config of a run \(seed is 'one'\)"),
        ("method: {a: 1}\ndata: [1]", r"is not the config of a run \(data is \[1\]\)"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, text, reason):
    folder = begun(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(ValueError, match=rf"run/config.yaml {reason}; restore or remove it"):
        folder.check(CONFIG)


def test_a_config_is_read_without_its_interpolations_and_not_through_links(tmp_path, monkeypatch):
    """Both would let a foreign run show what this machine keeps for itself."""
    monkeypatch.setenv("SECRET", "hunter2")
    folder = begun(tmp_path)
    folder.config.write_text("method: {name: sfd, note: '${oc.env:SECRET}'}\n")
    with pytest.raises(ValueError, match=r"config.yaml holds \$\{oc.env:SECRET\}, which is not resolved"):
        folder.read_config()
    folder.config.rename(tmp_path / "config.yaml")
    folder.config.symlink_to("../config.yaml")
    with pytest.raises(ValueError, match=r"config.yaml is a link that leads out of .*run, which is not followed"):
        folder.read_config()
    save_records(tmp_path / "metrics.json", [Record("run", "fid_digits", "student", 1, 2.5, 0.1, [2.4], 100.0)])
    folder.metrics.symlink_to("../metrics.json")
    with pytest.raises(ValueError, match=r"metrics.json is a link that leads out of .*run, which is not followed"):
        folder.final_records()


def test_a_run_is_complete_with_its_metrics(tmp_path):
    folder = begun(tmp_path)
    assert not folder.complete()
    save_records(folder.metrics, [Record("run", "fid_digits", "student", 1, 2.5, 0.1, [2.4, 2.6], 100.0)])
    assert folder.complete()
    assert "2.50 ± 0.10" in folder.results_table()


def test_differences_reach_into_nested_configs():
    old = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    new = {"a": {"b": 1, "c": {"d": 3}}, "e": [1, 2], "f": None, "g": {"h": 1}}
    assert differences(old, new) == [("a.c.d", 2, 3), ("g", None, {"h": 1})]


def test_one_process_at_a_time_trains_a_run(tmp_path):
    for folder in (RunFolder(tmp_path / "new"), begun(tmp_path / "begun")):
        with folder.held(CONFIG):
            kept = folder.config.read_bytes()
            for config in (CONFIG, CONFIG | {"seed": 7}):
                with pytest.raises(ValueError, match="another process trains this run"), folder.held(config):
                    pass
            assert folder.config.read_bytes() == kept
        with folder.held(CONFIG):
            pass
