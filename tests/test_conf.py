"""Every file in conf/ composes, and what it describes can be built."""

import functools
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from extractor_files import write_clip, write_dinov2
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from inception_file import write_inception
from omegaconf import OmegaConf
from vgg_file import write_vgg16

from launch.evaluate.measure import SETTINGS, leave_out_measurement
from launch.run.build import build, build_trainer, check_fit
from launch.run.folder import RunFolder
from launch.run.names import data_of, register_resolvers
from launch.run.teachers import expand_teachers
from launch.sweep.search import check_interval
from stillhouse.checkpoints import save_weights
from stillhouse.diffusion.losses import regression
from stillhouse.diffusion.time_distributions import UShaped
from stillhouse.metrics import fidelity

CONF = Path(__file__).parent.parent / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if "local" not in path.parts)
FILES.remove(Path("sweep/wandb.yaml"))  # W&B's, not Hydra's
# Recipes whose numbers are tested below are built there.
BUILT = re.compile(r"(progressive|sfd)_(cifar10|imagenet64)|(rectified_flow|reflow|flow_distill|bezier)_cifar10")
# Published teachers have a test of their own.
COMPOSED = [
    f
    for f in FILES
    if len(f.parts) > 1
    and f.parts[0] not in ("hydra", "task")
    and f.parts[0] != "shrink"  # tests/launch/run/test_plan.py has trainer=debug of all methods
    and "shared" not in f.parts  # composed with what shares it
    and f.parts[:-1] != ("teacher",)
    and not BUILT.search(f.stem)
]
# Data sets with a published or embedded teacher; a run of the others is given a new network here.
PUBLISHED = ("digits", "cifar10", "ffhq64", "imagenet64", "lsun_bedroom", "lsun_church")
FLOWS = ("reflow", "flow_distill", "bezier")


@pytest.fixture(autouse=True)
def _conf():
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_inception():
    """Its network takes a second to build and to hash, and every config of images has two."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_network", "hash_state"):
            patch.setattr(fidelity, name, functools.cache(getattr(fidelity, name)))
        yield


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """Where Inception's and LPIPS' weights are, though random ones."""
    home = tmp_path_factory.mktemp("torch")
    write_inception(home / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth")
    write_vgg16(home / "hub/checkpoints/vgg16-397923af.pth")
    write_clip(home / f"hub/checkpoints/{Path(OmegaConf.load(CONF / 'evaluation/clip.yaml').extractor.weights).name}")
    write_dinov2(home / "hub/checkpoints/dinov2_vitb14_pretrain.pth", width=768)
    with mock.patch("stillhouse.metrics.fidelity.check_hub_name"):
        yield home


def composed(arguments: list[str], data: str = "digits"):
    """A run's config as train.py has it, of an untrained network of few parameters.

    Of data without a published teacher a distillation is given a new network.
    """
    method = next((a.removeprefix("method=") for a in arguments if a.startswith("method=")), "denoising_student")
    named = any(a.startswith("teacher=") for a in arguments) or method in ("pretrain", "rectified_flow", "bezier")
    flow = method in FLOWS
    if not named and data not in (("digits", "cifar10") if flow else PUBLISHED):
        arguments = [*arguments, f"teacher={'scratch_flow' if flow else 'scratch'}"]
    cfg = compose("config", arguments)
    if method == "bezier" and data not in ("digits", "cifar10"):
        new = compose("config", [f"data={data}", "teacher=scratch_flow"]).teacher
        OmegaConf.update(cfg, "method.teachers", [OmegaConf.to_container(new, resolve=True)] * 2)
    expand_teachers(cfg)
    if data != "digits":
        for teacher in cfg.method.get("teachers") or [cfg.teacher]:
            shrink(teacher)
    return cfg


def shrink(teacher) -> None:
    teacher.weights, network = None, teacher.network
    for key, value in {
        "num_blocks": 1,
        "model_channels": network.get("norm_groups", 8),
        "channels_per_head": 8,
    }.items():
        if key in network:
            network[key] = value


def override(file: Path) -> tuple[list[str], str]:
    """The command line that takes a file of conf/, and the data that it is of."""
    group, option = "/".join(file.parts[:-1]), file.stem
    if file == Path("evaluation/fashion.yaml"):
        return ["data=fashion_mnist", "data.resolution=16", f"{group}={option}"], "fashion_mnist"
    if group == "data":
        path = ["data.path=my_photos"] if option == "image_folder" else []
        return [f"data={option}", *path], option
    if group.startswith("teacher/"):
        data = {"mlp": "checkerboard", "ddpmpp_small": "digits"}.get(option, "ffhq64")
        return [f"data={data}", "method=pretrain", "teacher=scratch", f"{group}={option}"], data
    if group == "host":
        return ["method=b_dense", f"{group}={option}"], "digits"
    if group == "recipe":  # METHOD[_HOST]_DATA[_VARIANT]
        data = next(path.stem for path in (CONF / "data").glob("*.yaml") if f"_{path.stem}" in option)
        method, _, variant = option.partition(f"_{data}")
        host = method.removeprefix("b_dense").removeprefix("_") if method.startswith("b_dense") else ""
        chosen = ["method=b_dense", f"host={host}"] if host else [f"method={method}"]
        return [*chosen, f"data={data}", *([f"recipe={option}"] if variant else [])], data
    return [f"{group}={option}"], "digits"


def option_names(cfg: dict, prefix: str = "") -> set[str]:
    return {
        name
        for key, value in cfg.items()
        if key != "defaults"
        for name in (option_names(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def with_slow(files: list[Path]) -> list:
    """Slow are a method's recipes but the one with the most options and those that recipe= chooses, and then the files that
    another quick case takes as well: those of a recipe's method, host and data, and the defaults."""
    lines, of_method = {file: override(file)[0] for file in files}, {}
    for file, (*method, last) in lines.items():
        if file.parts[0] == "recipe" and last.startswith("data="):
            options = option_names(OmegaConf.to_container(OmegaConf.load(CONF / file)))
            of_method.setdefault(tuple(method), []).append((file, options))
    most = {max(recipes, key=lambda recipe: (len(recipe[1]), recipe[0]))[0] for recipes in of_method.values()}
    slow = {file for recipes in of_method.values() for file, _ in recipes} - most
    taken = [set(lines[file]) for file in files if file.parts[0] == "recipe" and file not in slow]
    slow |= {file for file in files if file.stem == "default" or any(set(lines[file]) < line for line in taken)}
    return [pytest.param(file, marks=pytest.mark.slow if file in slow else ()) for file in files]


@pytest.mark.parametrize("file", with_slow(COMPOSED), ids=str)
def test_every_file_composes_and_builds(file, tmp_path, monkeypatch, torch_home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    cfg = composed(*override(file))
    leave_out_measurement(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    data = build(cfg.data)
    if file.parts[0] == "teacher":
        build(cfg.teacher)
        return
    method = build(cfg.method)
    if method.takes_consistency_model:  # of a run that is not here
        method.teacher.solver = "renoising"
    check_fit(method, data)
    assert method.batch_size == data.batch_size == cfg.batch_size
    nothing = file == Path("evaluation/none.yaml")
    assert set(build(cfg.evaluation)) == ({"extractor", "metrics"} if nothing else SETTINGS) | {"training"}
    if file == Path("trainer/ddp.yaml"):
        assert cfg.trainer.accelerator == "gpu"  # only a GPU machine can build it
        return
    if file.parts[0] not in ("data", "evaluation"):
        trainer = build_trainer(cfg, method, RunFolder(cfg.folder))
        assert trainer.max_steps == method.total_steps
    if file.parts[0] == "recipe":
        check_interval(cfg, method.total_steps)


# Of each published or embedded network: parameters, and network evaluations of a sample.
SIZES = {
    "digits": (None, 19),
    "digits_rf1": (None, 19),
    "digits_rf2": (None, 19),
    "fashion_mnist": (None, 35),
    "fashion_mnist_rf1": (None, 19),
    "cifar10": (55_733_891, 35),
    "cifar10_cond": (55_735_299, 35),
    "cifar10_ve": (56_397_827, 35),
    "cifar10_cond_ve": (56_400_643, 35),
    "cifar10_baseline_vp": (61_804_419, 35),
    "cifar10_baseline_ve": (62_758_787, 35),
    "cifar10_rf1": (61_804_419, 127),
    "cifar10_rf2": (61_804_419, 127),
    "cifar10_ddpm": (35_746_307, 96),
    "cifar10_ect": (55_732_739, 1),  # without augmentation's labels
    "cifar10_sid": (55_733_891, 1),
    "imagenet64_cd": (295_899_267, 1),
    "ffhq64": (61_805_571, 79),
    "ffhq64_ve": (62_761_091, 79),
    "imagenet64": (295_899_267, 511),
    "imagenet64_edm2_s": (280_209_253, 63),
    "imagenet64_edm2_m": (497_803_045, 63),
    "imagenet64_edm2_l": (777_492_197, 63),
    "imagenet64_edm2_xl": (1_119_276_709, 63),
    "lsun_bedroom": (113_673_219, 50),
    "lsun_church": (113_673_219, 50),
    "celebahq256_ddpm": (113_673_219, 50),
}


# Of a network that is here in another size, for other data or labels, or by another training.
SIBLINGS = (
    *("imagenet64_edm2_m", "imagenet64_edm2_l", "cifar10_cond", "cifar10_cond_ve", "cifar10_baseline_ve", "ffhq64_ve"),
    *("cifar10_rf2", "digits_rf2", "lsun_church"),
)


def test_the_published_teachers_are_all_here():
    names = {path.stem for path in (CONF / "teacher").glob("*.yaml")} - {"none", "scratch", "scratch_flow"}
    assert names == set(SIZES)


@pytest.mark.parametrize("teacher", [pytest.param(t, marks=pytest.mark.slow if t in SIBLINGS else ()) for t in SIZES])
def test_the_published_networks_have_their_size_and_ask_for_their_weights(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clothes = ["data=fashion_mnist", "data.resolution=16"]
    photos = {
        "celebahq256_ddpm": ["data=image_folder", "data.path=my_photos", "data.resolution=256"],
        "fashion_mnist": clothes,
        "fashion_mnist_rf1": clothes,
    }.get(teacher, [f"data={data_of(teacher)}"])
    cfg = compose("evaluate", ["task=teacher", f"teacher={teacher}", *photos])
    parameters, evaluations = SIZES[teacher]
    assert cfg.teacher.name == teacher.replace("fashion_mnist", "fashion16")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    weights = cfg.teacher.weights
    if parameters is not None:
        with torch.device("meta"):
            network = build(cfg.teacher.network)
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert build(cfg.teacher.source).name == Path(weights).stem
        shrink(cfg.teacher)
    built = build(cfg.teacher)
    assert built.nfe() == evaluations
    if parameters is not None and cfg.teacher.source.url:
        cfg.teacher.weights = weights
        with pytest.raises(Exception, match=r"no weights at .*safetensors .*or set teacher.weights"):
            build(cfg.teacher)


def chosen_teacher(method: str, data: str, *more: str) -> str:
    return choices(f"method={method}", f"data={data}", *more)["teacher"]


def test_the_teacher_follows_the_data_where_one_is_published():
    for method, data, teacher in (
        ("denoising_student", "digits", "digits"),
        ("denoising_student", "celeba64", "none"),
        ("pretrain", "cifar10", "cifar10"),
        ("pretrain", "celeba64", "scratch"),
        ("rectified_flow", "cifar10", "cifar10_rf1"),
        ("rectified_flow", "ffhq64", "scratch_flow"),
        ("reflow", "digits", "digits_rf1"),
        ("flow_distill", "digits", "digits_rf2"),
        ("flow_distill", "checkerboard", "none"),
        ("bezier", "digits", "none"),
    ):
        assert chosen_teacher(method, data) == teacher
    assert chosen_teacher("reflow", "cifar10", "teacher=cifar10") == "cifar10"
    with pytest.raises(
        ValueError, match=r"sfd needs a teacher.* say teacher=NAME .*method=pretrain .*teacher=runs/NAME"
    ):
        expand_teachers(compose("config", ["method=sfd", "data=celeba64"]))


@pytest.mark.parametrize(
    ("data", "network", "sizes"),
    [
        ("checkerboard", "MLP", None),
        ("cifar10", "SongUNet", [2, 2, 2]),
        ("celeba64", "SongUNet", [1, 2, 2, 2]),
        ("lsun_church", "SongUNet", [1, 1, 1, 2, 2, 2]),
        ("imagenet64_downsampled", "DhariwalUNet", [1, 2, 3, 4]),
        ("image_folder data.path=p data.resolution=28", "SongUNet", [2, 2]),
        ("image_folder data.path=p data.resolution=8", "SongUNet", [2]),
    ],
)
def test_a_new_network_suits_the_data(data, network, sizes):
    cfg = compose("config", ["method=pretrain", "teacher=scratch", *f"data={data}".split()])
    assert cfg.teacher.network._target_.rpartition(".")[2] == network
    assert cfg.teacher.network.get("channel_mult") == sizes
    with torch.device("meta"):
        build(cfg.teacher.network)


def test_a_part_of_a_teacher_is_exchanged_whole():
    cfg = compose("config", ["method=pretrain", "data=celeba64", "teacher/network=mlp", "teacher/preconditioning=vp"])
    parts = (cfg.teacher.network, cfg.teacher.preconditioning, cfg.teacher.schedule)
    assert [part._target_.rpartition(".")[2] for part in parts] == ["MLP", "VP", "karras"]
    assert "model_channels" not in cfg.teacher.network


@pytest.mark.parametrize("program", ["config", "evaluate"])
def test_the_evaluation_follows_the_data_and_can_be_chosen(program, tmp_path):
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/evaluation/other.yaml").write_text("defaults: [digits]\nnum_samples: 77\n")
    other = (CONF / "data/digits.yaml").read_text().replace("evaluation: digits", "evaluation: other")
    (tmp_path / "conf/data/other.yaml").write_text(other)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        task = ["task=teacher"] if program == "evaluate" else []
        for data, arguments, count in (("digits", [], 2000), ("other", [], 77), ("other", ["evaluation=digits"], 2000)):
            options = [*task, "teacher=digits", f"data={data}", *arguments]
            assert compose(program, options).evaluation.num_samples == count


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
    assert recipe("method=b_dense", "host=progressive", "data=cifar10") == "b_dense_progressive_cifar10"
    assert recipe("method=sfd", "data=imagenet64") == "sfd_imagenet64"
    assert recipe("method=sfd", "data=cifar10", "recipe=sfd_cifar10_one_step") == "sfd_cifar10_one_step"


def recipe_of(option: str, *arguments: str):
    """The config and the method of a recipe, with a network of few parameters."""
    options, data = override(Path(f"recipe/{option}.yaml"))
    cfg = composed([*options, *(a for a in arguments if "weights" not in a)], data)
    cfg.teacher.weights = next((a.partition("=")[2] for a in arguments if "weights" in a), None)
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
    assert method.total_steps * images / 1000 % cfg.evaluation.training.every_kimg == 0  # of the last round


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
    assert method.total_steps == math.ceil(trajectories * 1000 / 128)  # 200,000 are 1562.5: its code takes 1563
    grid = method.grids[method.choices[-1]]
    torch.testing.assert_close(grid[:: method.substeps], torch.tensor(levels).double(), rtol=5e-3, atol=0)
    if option.startswith("b_dense"):
        assert (method.branches, method.auxiliary_weights.tolist()) == (4, pytest.approx([0.1] * 3))


def test_sfd_for_several_steps_draws_each_as_often():
    _, method = recipe_of("sfd_cifar10_variable")
    drawn = method.steps_of(range(400))
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


@pytest.mark.parametrize(
    ("option", "updates", "images", "decay", "clip", "dropout", "loss"),
    [
        ("rectified_flow_cifar10", 800_000, 128, 0.999999, 1536, 0.15, "l2"),
        ("reflow_cifar10", 200_000, 128, 0.9999, 1536, 0.1, "l2"),
        ("flow_distill_cifar10", 200_000, 128, 0.9999, 1, 0.1, "lpips"),
        ("bezier_cifar10", 200_000, 128, 0.9999, 1, 0.1, "lpips"),
        ("reflow_cifar10_improved", 800_000, 512, 0.9999, None, 0.15, "huber"),
    ],
)
def test_flows_have_the_numbers_of_their_code(
    option, updates, images, decay, clip, dropout, loss, monkeypatch, torch_home
):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    cfg = composed(*override(Path(f"recipe/{option}.yaml")))
    method = build(cfg.method)
    assert (method.total_steps, cfg.batch_size, method.warmup_nimg / images) == (updates, images, 5000)
    assert (method.lr, method.betas) == (2e-4, (0.9, 0.999))
    assert OmegaConf.to_container(cfg.callbacks.ema.averages) == [{"decay": decay}]
    assert cfg.trainer.gradient_clip_val == clip
    assert cfg.method.loss == loss
    student = method.student.network
    assert {block.p for block in student.modules() if isinstance(block, torch.nn.Dropout)} == {dropout}
    if option != "rectified_flow_cifar10":
        assert (cfg.method.pairs, cfg.method.dtype) == (1_000_000, "float16")
        assert cfg.method.held_out % images == 0 or cfg.method.held_out == 10_000


def test_the_improved_reflow_begins_as_edms_teacher(monkeypatch):
    chosen = ["method=reflow", "data=cifar10", "recipe=reflow_cifar10_improved", "teacher=cifar10"]
    method = build(composed(chosen, "cifar10").method)
    assert (method.teacher.name, method.teacher.nfe()) == ("cifar10", 35)
    assert method.times == UShaped(4.0)
    assert method.start == pytest.approx(1 / 81)


def test_the_gradient_of_the_published_flow_loss_is_ours_over_1536():
    """Theirs is the mean of |v - target|^2 over pixels, by which the recipes' clipping is scaled."""
    v, target = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    v.requires_grad_()
    (ours,) = torch.autograd.grad(regression(v, target, "l2").mean(), v)
    (theirs,) = torch.autograd.grad((v - target).square().mean(), v)
    torch.testing.assert_close(ours, 1536 * theirs)


def test_a_sweep_of_curves_has_a_folder_for_each():
    chosen = [
        ["method=bezier", f"method.order={n}", f"method.slot={s}"] for n in (1, 2) for s in ("linear", "endpoint")
    ]
    folders = [compose("config", c, return_hydra_config=True).hydra.sweep.subdir for c in chosen]
    expected = "bezier-digits-seed0-method.order-{}-method.slot-{}"
    assert folders == [expected.format(n, s) for n in (1, 2) for s in ("linear", "endpoint")]


def test_a_search_of_branch_weights_is_of_b_dense_and_takes_its_recipe():
    found = choices("sweep=b_dense_branch_weights", "data=cifar10")
    assert (found["method"], found["host"], found["recipe"]) == ("b_dense", "sfd", "b_dense_sfd_cifar10")
    assert found["hydra/sweeper"] == "search"
    assert choices("data=cifar10", "method=b_dense")["hydra/sweeper"] == "grid"
    cfg = compose("config", ["sweep=b_dense_branch_weights", "data=cifar10"])
    assert (cfg.seed, cfg.method.lr, cfg.method.steps) == (100, 5e-5, 2)  # the recipe's; held out from results' seeds
    cfg = compose("config", ["sweep=b_dense_branch_weights", "host=progressive", "seed=101"])
    assert (cfg.seed, cfg.method.name) == (101, "b_dense_progressive")


def test_every_key_has_a_comment_near_it():
    """A newcomer reads the YAML: each file opens with a comment that says what it is."""
    for file in FILES:
        if file.parts[0] != "hydra" and file.parts[0] != "callbacks":
            assert (CONF / file).read_text().startswith("#"), file
