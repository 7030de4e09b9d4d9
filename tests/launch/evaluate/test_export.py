"""Exported students: plain diffusers samples them, where this project can't be imported, and makes the same images."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from launch.evaluate.export import check_alike, check_target, export, main, portable
from launch.evaluate.trained_run import TrainedRun, Weights
from launch.run.build import build, build_seeded
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from launch.run.teachers import expand_teachers
from stillhouse.checkpoints import DiffusersFolder, hash_state
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.metrics.records import Record

CONF = Path(__file__).parents[3] / "conf"
TINY = ("teacher.weights=null", "teacher.network.model_channels=8")
RGB = (
    *TINY,
    "teacher.network.channel_mult=[1,1]",
    "teacher.network.num_blocks=1",
    "teacher.network.attn_resolutions=[]",
    "data.resolution=8",
    "teacher.steps=4",
)
# preconditioning: (its options, the schedule's)
OTHERS = {
    "of_noise": ({"_target_": "stillhouse.diffusion.preconditioning.Epsilon"}, "ddim_uniform"),
    "progressive": ({"_target_": "stillhouse.diffusion.preconditioning.V"}, "cosine_uniform"),
}
# Of students that read their network in another way than the teacher's config says.
OWN = {"own_reading": EDM(sigma_data=0.6)}
# name: (options, number of steps to choose or None)
CASES = {
    "denoising_student": (("method=denoising_student", "teacher.steps=4", *TINY), None),
    "of_noise": (("method=denoising_student", "teacher.steps=4", *TINY), None),
    "ddpm": (
        ("method=denoising_student", "data=cifar10", "teacher=cifar10_ddpm", "teacher.network.norm_groups=4", *RGB),
        None,
    ),
    "diff_instruct": (("method=diff_instruct", "data=cifar10", *RGB), None),
    "disback": (("method=disback", *TINY), None),
    "sida": (("method=sida", *TINY), None),
    "dmd2": (("method=dmd2", "method.steps=2", *TINY), None),
    "dmd2_in_one": (("method=dmd2", "method.steps=2", *TINY), 1),
    "moment_matching": (("method=moment_matching", "method.steps=2", *TINY), None),
    "moment_matching_in_three": (("method=moment_matching", "method.steps=2", *TINY), 3),
    "consistency_distillation": (("method=consistency_distillation", *TINY), None),
    "consistency_distillation_in_two": (("method=consistency_distillation", *TINY), 2),
    "ect": (("method=ect", *TINY), None),
    "ect_in_two": (("method=ect", *TINY), 2),
    "tcm": (("method=tcm", "teacher.solver=renoising", *TINY), None),
    "tcm_in_two": (("method=tcm", "teacher.solver=renoising", *TINY), 2),
    "cmt": (("method=cmt", *TINY), None),
    "cmt_in_two": (("method=cmt", *TINY), 2),
    "scm": (("method=scm", *TINY), None),
    "scm_in_two": (("method=scm", *TINY), 2),
    "mean_flow": (("method=mean_flow", *TINY), None),
    "mean_flow_in_two": (("method=mean_flow", *TINY), 2),
    "imm": (("method=imm", *TINY), None),
    "imm_in_two": (("method=imm", *TINY), 2),
    "progressive": (("method=progressive", "method.start_steps=8", "method.end_steps=2", *TINY), None),
    "two_steps": (("method=progressive", "method.start_steps=8", "method.end_steps=2", *TINY), None),
    "own_reading": (("method=progressive", "method.start_steps=8", "method.end_steps=2", *TINY), None),
    "sfd": (("method=sfd", "method.steps=[2,3]", "method.afs=true", *TINY), 2),
    "b_dense": (("method=b_dense", "host=sfd", "method.steps=1", *TINY), None),
    "large": (("method=diff_instruct", "data=imagenet64", "teacher.network.channels_per_head=8", *RGB), None),
    "stochastic": (
        ("method=pretrain", "teacher.solver=stochastic_heun", "+teacher.solver_options={s_churn:2.0}", *TINY),
        None,
    ),
    "flow": (("method=rectified_flow", "teacher=digits_rf1", "teacher.steps=3", *TINY), None),
    "flow_distill": (("method=flow_distill", "teacher=digits_rf1", "method.steps=2", *TINY), None),
    "points": (
        ("method=rectified_flow", "data=eight_gaussians", "teacher=scratch_flow"),
        2,
    ),
}
ELSEWHERE = """
import sys, pathlib
rooms = ("stillhouse", "launch", "lightning_modules", "datamodules", "callbacks")
sys.modules.update(dict.fromkeys(rooms))  # None: an import of one fails
import torch
from diffusers import DiffusionPipeline, UNet2DModel

for folder in sorted(path for path in pathlib.Path(sys.argv[1]).iterdir() if path.is_dir()):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    found = {"seeds": pipe(seeds=[0, 1, 2], output_type="pt").images}
    found["again"] = pipe(seeds=[2], output_type="pt").images
    draws = [pipe(2, generator=torch.Generator().manual_seed(5), output_type="pt").images for _ in range(2)]
    found["drawn"] = torch.stack(draws)
    if pipe.student.image_shape[0] != 2:
        found["size"] = pipe(seeds=[0]).images[0].size
    if pipe.student.num_classes:
        found["third"] = pipe(seeds=[0, 1, 2], class_labels=3, output_type="pt").images
    if (folder / "unet").is_dir():
        x, t = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8), torch.tensor([999, 4])
        with torch.no_grad():
            found["unet"] = UNet2DModel.from_pretrained(folder, subfolder="unet")(x, t).sample
    torch.save(found, folder.with_suffix(".pt"))
assert not [name for name in sys.modules if name.partition(".")[0] in rooms and sys.modules[name] is not None]
"""


def made(name: str) -> tuple:
    """A case's method, whose student differs from its teacher, and the run's config."""
    options, steps = CASES[name]
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*options, "trainer.accelerator=cpu"])
        if name in OTHERS:
            with open_dict(cfg):
                cfg.teacher.preconditioning, schedule = OTHERS[name]
                cfg.teacher.schedule = {"_target_": f"stillhouse.diffusion.schedules.{schedule}", "_partial_": True}
        expand_teachers(cfg)
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    method = build_seeded(cfg.method, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in method.student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    method.student.preconditioning = OWN.get(name, method.student.preconditioning)
    if steps:
        method.choose_steps(steps, Path())
    return method, cfg


def exported(folder: Path, name: str, records=()) -> torch.Tensor:
    """Export a case into folder/NAME; the images of the seeds 0, 1 and 2 by the method itself."""
    method, cfg = made(name)
    classes = build(cfg.data).num_classes
    run = RunFolder(folder.parent / "runs" / name)
    run.claim(OmegaConf.to_container(cfg))
    trained = TrainedRun(run, cfg, method, Weights("ema_500kimg"))
    export(folder / name, portable(method, cfg, classes), trained, records)
    seeds = torch.arange(3)
    return method.sample(sample_noise(seeds, method.image_shape), sample_labels(seeds, classes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the folder of all exports, {case: our images}, {case: what diffusers made of it elsewhere})."""
    place = tmp_path_factory.mktemp("elsewhere")
    record = Record(
        "run", "fid_digits", "student", 1, 12.5, None, [12.5], 100.0, {"num_samples": 20, "reference": "e" * 64}
    )
    (place / "exports").mkdir()
    ours = {name: exported(place / "exports", name, [record]) for name in CASES}
    (place / "sample.py").write_text(ELSEWHERE)
    (place / "cwd").mkdir()
    environment = {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(place)}
    ended = subprocess.run(
        [sys.executable, "-I", str(place / "sample.py"), str(place / "exports")],
        cwd=place / "cwd",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return (
        place / "exports",
        ours,
        {name: torch.load(place / f"exports/{name}.pt", weights_only=True) for name in CASES},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_diffusers_makes_the_same_images_without_this_project(folders, name):
    _, ours, theirs = folders
    found = theirs[name]
    assert ours[name].std() > 1e-3
    torch.testing.assert_close(found["seeds"], ours[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["again"], found["seeds"][2:], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["drawn"][0], found["drawn"][1])
    assert not torch.allclose(found["drawn"][0], ours[name][:2], atol=1e-3)
    if name != "points":
        assert found["size"] == (8, 8)
    if name == "large":
        assert not torch.allclose(found["third"], found["seeds"], atol=1e-4)


@pytest.mark.slow
def test_the_network_of_ddpm_is_diffusers_own(folders):
    method, _ = made("ddpm")
    x, t = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8), torch.tensor([999.0, 4.0])
    with torch.no_grad():
        ours = method.student.eval().network(x, t)
    torch.testing.assert_close(folders[2]["ddpm"]["unet"], ours, rtol=1e-5, atol=1e-5)
    assert ours.std() > 1e-3
    file, other = folders[0] / "ddpm/unet/diffusion_pytorch_model.safetensors", copy.deepcopy(method.student.network)
    state, _ = DiffusersFolder(file).read(file, other, method.teacher.denoiser.preconditioning)
    assert hash_state(state) == hash_state(method.exported())
    assert 'subfolder="unet"' in (folders[0] / "ddpm/README.md").read_text()


@pytest.mark.slow
def test_what_a_folder_holds(folders):
    folder = folders[0] / "sfd"
    names = {path.name for path in folder.iterdir()}
    files = "README.md LICENSE-code config.yaml model_index.json pipeline.py student student.safetensors student.json"
    assert names == set(files.split())
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".ckpt", ".tmp")]
    config = json.loads((folder / "student/config.json").read_text())
    assert config["network"]["name"] == "SongUNet"
    assert config["sampling"]["analytic_first"] is True
    assert len(config["sampling"]["sigmas"]) == 4, "two evaluations after the analytic step"
    assert OmegaConf.load(folder / "config.yaml").method.name == "sfd"
    for path in folder.rglob("*.py"):
        assert "from networks" not in path.read_text()
        assert "from diffusion" not in path.read_text()


@pytest.mark.slow
def test_the_card_says_what_a_user_has_to_know(folders):
    card = (folders[0] / "large/README.md").read_text()
    for part in (
        "license: cc-by-nc-sa-4.0",
        "**Non-commercial use only**: the weights derive from a teacher under CC-BY-NC-SA-4.0",
        "| method | diff_instruct |",
        "| network evaluations per image (NFE) | 1 |",
        "imagenet64, 8x8, RGB, conditioned on 1000 classes",
        "fid_digits",
        "12.5",
        "fingerprint",
        "pipe(seeds=[0, 1, 2])",
    ):
        assert part in card, part
    assert "The weights are under Apache-2.0" in (folders[0] / "denoising_student/README.md").read_text()


@pytest.mark.slow
def test_the_weights_are_a_teachers(folders):
    method, cfg = made("disback")
    with open_dict(cfg):
        cfg.method.teacher.weights = str(folders[0] / "disback/student.safetensors")
    ours = build(cfg.method.teacher).denoiser.network.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in method.student.network.state_dict().items())


def test_where_to_is_checked_before_the_run_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "empty"):
        Path(name).mkdir(parents=True)
    for name in ("a", "b"):
        Path(f"runs/{name}/config.yaml").write_text("not a run's")
    assert check_target("empty") == Path("empty")
    options = {
        "run": "runs/a",
        "target": "new",
        "steps": None,
        "weights": None,
        "checkpoint": None,
        "download": False,
    }
    for changes, message in (
        ({"run": None}, "say which run's student, and where to: task=export run=runs/NAME target=FOLDER"),
        ({"target": None}, "say which run's student, and where to: task=export run=runs/NAME target=FOLDER"),
        ({"run": "runs/*"}, "export is for the student of one run, at one number of steps"),
        ({"steps": [1, 2]}, "export is for the student of one run, at one number of steps"),
        ({"target": "runs/b"}, "target=runs/b exists already; choose another folder, or remove it$"),
        (
            {"target": "runs/a/config.yaml"},
            "target=runs/a/config.yaml exists already; choose another folder, or remove it$",
        ),
        ({"target": "runs/a/config.yaml/a"}, "cannot write runs/a/config.yaml/a: Not a directory"),
        ({}, "config.yaml is not the config of a run"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            main(OmegaConf.create(options | changes))
    assert not Path("new").exists()


@pytest.mark.slow
def test_misuse():
    method, cfg = made("disback")
    with open_dict(cfg):
        cfg.method.teacher.network._target_ = "elsewhere.Network"
    with pytest.raises(
        ValueError, match=r"export: Network is not among the parts that a folder can carry \(SongUNet, "
    ):
        portable(method, cfg, 10)
    method, cfg = made("disback")
    student = portable(method, cfg, 10)
    student.path = type(student.path)((3.0, 0.0), 3.0)
    with pytest.raises(ValueError, match="export: the copy's images differ from those of disback by"):
        check_alike(student, method)


def test_a_copy_that_differs_by_little_more_than_rounding_is_refused():
    """A student of two steps whose preconditioning is its teacher's but for 1e-5: pictures that differ by some 1e-5."""
    method, cfg = made("two_steps")
    student = portable(method, cfg, 10)
    student.denoiser.preconditioning = EDM(0.5 + 1e-5)
    noise, labels = student.inputs(torch.arange(2))
    assert 1e-7 < (student.generate(noise, labels) - method.sample(noise, labels)).abs().max() < 5e-5
    with pytest.raises(
        ValueError, match=r"export: the copy's (images|estimates at noise level .*) differ from those of"
    ):
        check_alike(student, method)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("launch.evaluate.export.copy_modules", full)
    with pytest.raises(OSError, match="cannot write .*disback: No space left on device; free some space there"):
        exported(tmp_path / "exports", "disback")
    assert not list((tmp_path / "exports").iterdir())


def test_the_licence_is_that_of_all_teachers():
    method, _ = made("flow")
    assert method.licence == "Apache-2.0", "trained from random weights"
    method.sampler.weights, method.sampler.licence = "x.safetensors", "CC-BY-NC-SA-4.0"
    assert method.licence == "CC-BY-NC-SA-4.0"
