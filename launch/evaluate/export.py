"""task=export: write a trained student as a folder that plain diffusers samples, where this project is not installed."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import Tensor

from launch.evaluate.model_card import readme
from launch.evaluate.options import WeightsOptions, path_option, run_folders, step_counts
from launch.evaluate.portable_student import NETWORKS, Student
from launch.evaluate.trained_run import TrainedRun
from launch.run.build import build
from launch.run.teachers import students_teacher
from lightning_modules import Method
from stillhouse.checkpoints.weights import PROJECT_ROOT, hash_state, save_weights
from stillhouse.diffusion.preconditioning import PRECONDITIONINGS, description_of
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.files import atomic_write, check_writable, resolve_inside
from stillhouse.metrics.records import Record, load_records, merge_records
from stillhouse.networks.diffusers_unet import DiffusersUNet

_PREFIX = "stillhouse_"  # diffusers puts the modules of all local folders into one package
_IMPORT = re.compile(r"^from stillhouse\.(?:(\w+)\.)?(\w+) import", re.MULTILINE)
_PROBES = 2  # samples that the copy has to share with the original
_LEVELS = 5  # powers of ten, from the highest noise level down, where it has to estimate the same, as on sampling's own levels
_TOLERANCE = 16 * torch.finfo(torch.float32).eps  # what rounding may do to one evaluation, of the size of its terms


class Options(WeightsOptions):
    """conf/task/export.yaml."""

    run: Any
    target: Any
    steps: Any
    download: bool


def main(cfg: DictConfig) -> None:
    """Write the student of one run into `target`, with what was measured of these weights at this number of steps.

    Raises:
        ValueError: For impossible options, an occupied target, or a student that such a folder can't carry.
        OSError: Where the target can't be written.
    """
    if cfg.run is None or cfg.target is None:
        raise ValueError("say which run's student, and where to: task=export run=runs/NAME target=FOLDER")
    folders, counts = run_folders(cfg.run), step_counts(cfg.steps)
    if len(folders) > 1 or len(counts) > 1:
        raise ValueError("export is for the student of one run, at one number of steps")
    target = check_target(path_option(cfg, "target"))
    run = TrainedRun.load(folders[0], weights=cfg.weights, checkpoint=cfg.checkpoint, download=cfg.download)
    for count in counts:
        run = run.at_steps(count)
    student = portable(run.method, run.config, build(run.config.data).num_classes)
    records = measured(run)
    if not records:
        print(
            f"not measured with these weights and steps, so that the card has no values: evaluate.py run={folders[0]} ..."
        )
    export(target, student, run, records)
    print(f"{target} written")


def measured(run: TrainedRun) -> list[Record]:
    """Return the records, stored in the run's folder, of its student as it is now, and those that belong beside them."""
    weights, stored = hash_state(run.method.exported()), []
    for name in ("metrics.json", "evaluation/metrics.json"):
        path = resolve_inside(run.folder.path, name)
        stored += load_records(path) if path.is_file() else []
    stored = merge_records([], stored)
    ours = [
        record
        for record in stored
        if record.subject == "student"
        and record.nfe == run.method.nfe
        and (record.provenance or {}).get("weights") == weights
    ]
    beside = [record for record in stored if record.subject != "student" and record.kind in {r.kind for r in ours}]
    return [
        *(record for record in beside if record.subject == "teacher"),
        *ours,
        *(record for record in beside if record.subject == "real"),
    ]


def check_target(path: str | Path) -> Path:
    """Return the path of a folder that may be written.

    Raises:
        ValueError: For a path where something is already.
        OSError: For one that can't be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"target={path} exists already; choose another folder, or remove it")
    check_writable(path / "README.md" if path.exists() else path)
    return path


def portable(method: Method, stored: DictConfig, num_classes: int) -> Student:
    """Return the student as it samples now, on the CPU, with its own copy of the weights.

    Args:
        method: The run's, with its student in place.
        stored: The run's config.
        num_classes: 0 for data without labels.

    Raises:
        ValueError: For a network or preconditioning that such a folder can't carry, or where the copy would be another student.
    """
    network = dict(students_teacher(stored)["network"])
    network = {"name": str(network.pop("_target_")).rpartition(".")[2], **network}
    if method.student.two_times:
        network["two_times"] = True
    # The student's own, which may be another one than its teacher's.
    preconditioning = description_of(method.sampled_student().preconditioning)
    for part, known in ((network, NETWORKS), (preconditioning, PRECONDITIONINGS)):
        if part["name"] not in known:
            raise ValueError(
                f"export: {part['name']} is not among the parts that a folder can carry ({', '.join(known)})"
            )
    sampling = method.sampling(method.chosen_nfe)
    student = Student(
        network=network,
        preconditioning=preconditioning,
        sampling=sampling.plain(),
        num_classes=num_classes,
    )
    student.denoiser.network.load_state_dict(method.exported())
    check_alike(student, method)
    return student.eval()


@torch.no_grad()
def check_alike(student: Student, method: Method) -> None:
    """Compare the copy's samples and estimates with the method's.

    Raises:
        ValueError: Where they differ by more than float32's rounding.
    """
    device = next(method.student.parameters()).device
    noise, labels = (None if values is None else values.to(device) for values in student.inputs(torch.arange(_PROBES)))
    student.to(device)
    sampled = method.sample(noise, labels), student.generate(noise, labels)
    levels = [sigma for sigma in student.path.sigmas if sigma]
    bound = _TOLERANCE * len(levels) * (1 + sampled[0].abs().max().item())
    _check_equal(*sampled, bound, method, "images differ")
    training = method.student.training
    method.student.eval()
    for level in [*levels, *(levels[0] * 10.0**-k for k in range(1, _LEVELS))]:
        sigma = noise.new_full((), level)
        x = 0.5 * sample_noise(torch.arange(_PROBES), student.image_shape, stream=1).to(device) + sigma * noise
        theirs, ours = method.student(x, sigma, labels), student(x, sigma, labels)
        kept = method.student.preconditioning(sigma).skip * x
        bound = _TOLERANCE * (kept.abs().max() + (theirs - kept).abs().max()).item()
        _check_equal(theirs, ours, bound, method, f"estimates at noise level {level:.4g} differ")
    method.student.train(training)
    student.to("cpu")


def _check_equal(theirs: Tensor, ours: Tensor, bound: float, method: Method, text: str) -> None:
    worst = (ours - theirs).abs().max().item()
    if not worst <= bound:
        raise ValueError(
            f"export: the copy's {text} from those of {method.name} by {worst:.2g}, where rounding explains {bound:.2g}: "
            "it would be another student, and nothing was written"
        )


def export(target: str | Path, student: Student, run: TrainedRun, records: Sequence[Record]) -> None:
    """Write the folder, whole or not at all: pipeline, weights, the run's config, and README.md as its card.

    Args:
        target: The new folder.
        student: The portable copy.
        run: Where it comes from.
        records: The student's measurements, and those that belong beside them.

    Raises:
        ValueError: For an occupied target.
        OSError: Where the disk refuses.
    """
    method = run.method
    target = check_target(target)
    try:
        with atomic_write(target) as temporary:
            student.save_pretrained(temporary / "student")
            copy_modules(temporary / "student")
            if isinstance(student.denoiser.network, DiffusersUNet):
                plain_unet(student.denoiser.network).save_pretrained(temporary / "unet")
            index = {
                "_class_name": ["pipeline", "StudentPipeline"],
                "_diffusers_version": diffusers.__version__,
                "student": [f"{_PREFIX}student", "Student"],
            }
            (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            shutil.copyfile(Path(__file__).with_name("portable_pipeline.py"), temporary / "pipeline.py")
            card = {
                "run": run.folder.name,
                "method": method.name,
                "weights": run.weights.name,
                "licence": method.licence,
            }
            save_weights(temporary / "student.safetensors", student.denoiser.network.state_dict(), card)
            for path in temporary.glob("*/*.safetensors"):
                shutil.copymode(path.with_name("config.json"), path)  # its owner alone could read it
            (temporary / "config.yaml").write_text(OmegaConf.to_yaml(run.config))
            (temporary / "README.md").write_text(readme(student, run, records))
            if (PROJECT_ROOT / "LICENSE").is_file():
                shutil.copyfile(PROJECT_ROOT / "LICENSE", temporary / "LICENSE-code")
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {target}: {error}; free some space there or choose another folder") from error


def plain_unet(network: DiffusersUNet) -> diffusers.UNet2DModel:
    """Return a copy of the network as diffusers' own class, which takes unit noise and a time index."""
    unet = diffusers.UNet2DModel(**network.config)
    state = {re.sub(r"^embed\.layer", "time_embedding.linear_", name): t for name, t in network.state_dict().items()}
    unet.load_state_dict(state)
    return unet


def copy_modules(folder: Path) -> None:
    """Write stillhouse_student.py and every module of this project that it needs, with imports of each other alone."""
    student_file = Path(__file__).with_name("portable_student.py")
    texts: dict[str, str] = {}
    waiting = [("student", student_file)]
    while waiting:
        name, path = waiting.pop()
        if name in texts:
            continue
        text = path.read_text()
        texts[name] = _IMPORT.sub(rf"from .{_PREFIX}\2 import", text)
        waiting += [
            (module, PROJECT_ROOT / "stillhouse" / room / f"{module}.py") for room, module in _IMPORT.findall(text)
        ]
    # Of a local folder diffusers copies only the modules that the first one names, not those that these name.
    others = sorted(set(texts) - {"student"})
    named = [f"from .{_PREFIX}{name} import __name__ as _{name}  # noqa" for name in others]
    texts["student"] = "\n".join(
        [texts["student"].rstrip(), "", "# For diffusers, which copies what is named here.", *named, ""]
    )
    for name, text in texts.items():
        (folder / f"{_PREFIX}{name}.py").write_text(text)
