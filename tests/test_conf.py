"""Every file in conf/ composes, and what it describes can be built."""

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from launch.build import build, build_trainer
from launch.folder import RunFolder

CONF = Path(__file__).parent.parent / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if "local" not in path.parts)
PRIMARY = ("config", "evaluate")


@pytest.fixture(autouse=True)
def _conf():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def override(file: Path) -> list[str]:
    group, option = "/".join(file.parts[:-1]), file.stem
    return [f"{group}={option}"] if file.parts[0] != "hydra" else []


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in PRIMARY], ids=str)
def test_every_file_composes_and_builds(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if file == Path("teacher/none.yaml"):
        assert "name" not in (compose("evaluate", override(file)).teacher or {})
        return
    cfg = compose("config", override(file))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    data, method = build(cfg.data), build(cfg.method)
    assert method.batch_size == data.batch_size == cfg.batch_size
    assert set(build(cfg.evaluation)) == {"extractor", "metrics", "num_samples", "blocks", "batch_size", "training"}
    if file == Path("trainer/ddp.yaml"):
        assert cfg.trainer.accelerator == "gpu"  # only a GPU machine can build it
        return
    trainer = build_trainer(cfg, method, RunFolder(cfg.folder))
    assert trainer.max_steps == method.total_steps


@pytest.mark.parametrize("teacher", sorted(p.stem for p in (CONF / "teacher").glob("*.yaml") if p.stem != "none"))
def test_evaluate_composes_with_every_teacher(teacher):
    cfg = compose("evaluate", [f"teacher={teacher}"])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert cfg.teacher.name == teacher


@pytest.mark.parametrize("program", ["config", "evaluate"])
def test_the_evaluation_follows_the_data_and_can_be_chosen(program, tmp_path):
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/evaluation/other.yaml").write_text("defaults: [digits]\nnum_samples: 77\n")
    other = (CONF / "data/digits.yaml").read_text().replace("evaluation: digits", "evaluation: other")
    (tmp_path / "conf/data/other.yaml").write_text(other)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        for arguments, count in (([], 2000), (["data=other"], 77), (["data=other", "evaluation=digits"], 2000)):
            assert compose(program, ["teacher=digits", *arguments]).evaluation.num_samples == count


def test_a_recipe_of_method_and_data_overrides_all_but_the_command_line_and_debugging(tmp_path):
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("recipe", "local"))
    (tmp_path / "conf/recipe").mkdir()
    recipe = "# @package _global_\nbatch_size: 24\nmethod: {kimg: 3, lr: 0.5}\ntrainer: {gradient_clip_val: 1.5}\n"
    (tmp_path / "conf/recipe/pretrain_digits.yaml").write_text(recipe)

    def values(*arguments):
        cfg = compose("config", list(arguments))
        return cfg.batch_size, cfg.method.kimg, cfg.trainer.gradient_clip_val

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        assert values() == (128, 64, None)  # Denoising Student has none
        assert values("method=pretrain") == values("method=pretrain", "data=digits") == (24, 3, 1.5)
        assert values("method=pretrain", "batch_size=8", "method.kimg=2") == (8, 2, 1.5)
        assert values("method=pretrain", "trainer=debug") == (16, 0.16, 1.5)
        assert compose("config", ["method=pretrain", "trainer=debug"]).method.lr == 0.5


def test_every_key_has_a_comment_near_it():
    """A newcomer reads the YAML: each file opens with a comment that says what it is."""
    for file in FILES:
        if file.parts[0] != "hydra" and file.parts[0] != "callbacks":
            assert (CONF / file).read_text().startswith("#"), file
