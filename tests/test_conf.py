"""Every file in conf/ composes, and what it describes can be built."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from inception_file import write_inception
from omegaconf import OmegaConf

from launch.build import build, build_trainer, check_fit
from launch.folder import RunFolder
from launch.names import register_resolvers
from networks import save_weights

CONF = Path(__file__).parent.parent / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if "local" not in path.parts)
PRIMARY = ("config", "evaluate")
# Data sets whose teachers' weights are downloads: (parameters, network evaluations of a sample).
PUBLISHED = {"cifar10": (55_733_891, 35), "ffhq64": (61_805_571, 79), "imagenet64": (295_899_267, 511)}
SMALL = ("teacher.weights=null", "teacher.network.model_channels=8", "teacher.network.num_blocks=1")


@pytest.fixture(autouse=True)
def _conf():
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """Where Inception's weights are, though random ones."""
    home = tmp_path_factory.mktemp("torch")
    write_inception(home / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth")
    return home


def small(data: str) -> list[str]:
    """Options for an untrained network of few parameters, for data sets whose teacher is not here."""
    if data not in PUBLISHED:
        return []
    return [*SMALL, *(["teacher.network.channels_per_head=8"] if data == "imagenet64" else [])]


def override(file: Path) -> list[str]:
    group, option = "/".join(file.parts[:-1]), file.stem
    if group == "teacher" and option in PUBLISHED:
        group = "data"  # a teacher comes with its data
    if group == "method/host":
        return ["method=b_dense", f"{group}={option}"]
    if group == "recipe":  # METHOD[_HOST]_DATA[_VARIANT]
        data = next(path.stem for path in (CONF / "data").glob("*.yaml") if f"_{path.stem}" in option)
        method, _, variant = option.partition(f"_{data}")
        host = method.removeprefix("b_dense").removeprefix("_") if method.startswith("b_dense") else ""
        chosen = ["method=b_dense", f"method/host={host}"] if host else [f"method={method}"]
        return [*chosen, f"data={data}", *small(data), *([f"recipe={option}"] if variant else [])]
    return [f"{group}={option}", *small(option)] if file.parts[0] != "hydra" else []


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in PRIMARY], ids=str)
def test_every_file_composes_and_builds(file, tmp_path, monkeypatch, torch_home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    if file == Path("teacher/none.yaml"):
        assert "name" not in (compose("evaluate", override(file)).teacher or {})
        return
    cfg = compose("config", override(file))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    data, method = build(cfg.data), build(cfg.method)
    check_fit(method, data)
    assert method.batch_size == data.batch_size == cfg.batch_size
    assert set(build(cfg.evaluation)) == {"extractor", "metrics", "num_samples", "blocks", "batch_size", "training"}
    if file == Path("trainer/ddp.yaml"):
        assert cfg.trainer.accelerator == "gpu"  # only a GPU machine can build it
        return
    trainer = build_trainer(cfg, method, RunFolder(cfg.folder))
    assert trainer.max_steps == method.total_steps


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
@pytest.mark.parametrize("data", PUBLISHED)
def test_every_method_fits_the_published_teachers(data, method):
    cfg = compose("config", [f"data={data}", f"method={method}", *small(data)])
    assert cfg.evaluation.extractor._target_ == "metrics.extractors.Inception"
    images, built = build(cfg.data), build(cfg.method)
    check_fit(built, images)
    deterministic = (method, data) == ("denoising_student", "imagenet64")  # regresses what one noise becomes
    assert built.teacher is None or built.teacher.nfe() == (79 if deterministic else PUBLISHED[data][1])


@pytest.mark.parametrize("data", PUBLISHED)
def test_the_published_networks_have_their_size_and_ask_for_their_weights(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose("config", [f"data={data}"])
    with torch.device("meta"):
        network = build(cfg.teacher.network)
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[data][0]
    cfg.teacher = compose("config", [f"data={data}", *small(data), f"teacher.weights={cfg.teacher.weights}"]).teacher
    with pytest.raises(Exception, match=r"no weights at .*weights/edm-.*safetensors .*or set teacher.weights"):
        build(cfg.teacher)


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


def choices(*arguments: str) -> dict[str, str]:
    return compose("config", list(arguments), return_hydra_config=True).hydra.runtime.choices


def test_a_recipe_is_taken_by_itself_for_method_host_and_data():
    def recipe(*arguments):
        return choices(*arguments)["recipe"]

    assert recipe("method=b_dense", "data=cifar10") == "b_dense_sfd_cifar10"
    assert recipe("method=b_dense", "method/host=progressive", "data=cifar10") == "b_dense_progressive_cifar10"
    assert recipe("method=sfd", "data=imagenet64") == "sfd_imagenet64"
    assert recipe("method=sfd", "data=cifar10", "recipe=sfd_cifar10_one_step") == "sfd_cifar10_one_step"


def recipe_of(option: str, *arguments: str):
    """The config and the method of a recipe, with a network of few parameters."""
    cfg = compose("config", [*override(Path(f"recipe/{option}.yaml")), *arguments])
    return cfg, build(cfg.method)


@pytest.mark.parametrize(
    ("option", "start", "end", "long", "images"),
    [
        ("progressive_cifar10", 8192, 1, (2, 1), 128),
        ("progressive_imagenet64", 1024, 1, (2, 1), 2048),
        ("b_dense_progressive_cifar10", 1024, 128, (), 128),
    ],
)
def test_each_round_has_the_updates_of_the_papers(option, start, end, long, images):
    cfg, method = recipe_of(option)
    assert cfg.batch_size == images
    assert len(method.grid) == start + 1
    assert method.rounds == [2**k for k in range(start.bit_length() - 2, end.bit_length() - 2, -1)]
    updates = [b - a for a, b in pairwise([0, *method.ends])]
    assert updates == [100_000 if steps in long else 50_000 for steps in method.rounds]
    # Measured at the ends of rounds alone, where no sample takes more than 512 evaluations.
    every = 1000 * cfg.evaluation.training.every_kimg / images
    measured = [method.ends.index(step * every) for step in range(1, round(method.total_steps / every) + 1)]
    assert max(method.rounds[index] for index in measured) <= 512
    assert measured[-1] == len(method.rounds) - 1


@pytest.mark.parametrize(
    ("option", "trajectories", "levels"),
    [
        ("sfd_cifar10", 200, [80, 10.93, 0.670, 0.006]),
        ("sfd_imagenet64", 200, [80, 10.93, 0.670, 0.006]),
        ("b_dense_sfd_cifar10", 200, [80, 10.93, 0.670, 0.006]),
        ("b_dense_sfd_imagenet64", 200, [80, 10.93, 0.670, 0.006]),
        ("sfd_cifar10_variable", 800, [80, 31.7, 10.9, 3.11, 0.670, 0.0936, 0.006]),
        ("sfd_imagenet64_variable", 800, [80, 31.7, 10.9, 3.11, 0.670, 0.0936, 0.006]),
        ("sfd_cifar10_one_step", 2000, [80, 3.11, 0.006]),
    ],
)
def test_sfd_has_the_trajectories_and_times_of_its_code(option, trajectories, levels):
    _, method = recipe_of(option)
    batches = trajectories * 1000 / 128  # 200,000 are 1562.5: its code takes 1563
    assert abs(method.total_steps - batches * sum(method.choices) / len(method.choices)) <= 1
    grid = method.grids[method.choices[-1]]
    torch.testing.assert_close(grid[:: method.substeps], torch.tensor(levels).double(), rtol=5e-3, atol=0)
    if option.startswith("b_dense"):
        assert (method.branches, method.auxiliaries.tolist()) == (4, pytest.approx([0.1] * 3))


def test_sfd_for_several_steps_draws_each_as_often():
    _, method = recipe_of("sfd_cifar10_variable")
    drawn = [method.drawn_steps(step) for step in range(400)]
    assert all(60 < drawn.count(count) < 140 for count in (2, 3, 4, 5))


def test_the_second_stage_of_sfd_goes_on_from_the_first_ones_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, variable = recipe_of("sfd_cifar10_variable")
    _, method = recipe_of("sfd_cifar10_one_step")
    fine = method.grids[1]
    torch.testing.assert_close(fine, variable.grids[5][:: variable.substeps])  # what it was trained for
    torch.testing.assert_close(method.teacher.sigmas(), fine)
    trained = Path(first.folder) / "student.safetensors"
    trained.parent.mkdir(parents=True)
    save_weights(trained, variable.exported(), {})
    _, method = recipe_of("sfd_cifar10_one_step", f"teacher.weights={trained}")
    state = method.teacher.denoiser.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in variable.exported().items())
    asks = compose("config", ["method=sfd", "data=cifar10", "recipe=sfd_cifar10_one_step"])
    assert asks.teacher.weights == str(trained)
    trained.unlink()
    with pytest.raises(Exception, match=f"no weights at .*{trained}.* or set teacher.weights"):
        recipe_of("sfd_cifar10_one_step", f"teacher.weights={trained}")


def test_a_search_of_branch_weights_is_of_b_dense_and_takes_its_recipe():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = choices("sweep=b_dense_branch_weights", "data=cifar10")
    assert (found["method"], found["method/host"], found["recipe"]) == ("b_dense", "sfd", "b_dense_sfd_cifar10")
    assert found["hydra/sweeper"] == "optuna"
    assert choices("data=cifar10", "method=b_dense")["hydra/sweeper"] == "basic"
    cfg = compose("config", ["sweep=b_dense_branch_weights", "data=cifar10"])
    assert (cfg.seed, cfg.method.lr, cfg.method.steps) == (100, 5e-5, 2)  # the recipe's; held out from results' seeds
    cfg = compose("config", ["sweep=b_dense_branch_weights", "method/host=progressive", "seed=101"])
    assert (cfg.seed, cfg.method.name) == (101, "b_dense_progressive")


def test_every_key_has_a_comment_near_it():
    """A newcomer reads the YAML: each file opens with a comment that says what it is."""
    for file in FILES:
        if file.parts[0] != "hydra" and file.parts[0] != "callbacks":
            assert (CONF / file).read_text().startswith("#"), file
