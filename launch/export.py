"""A trained student as a folder that plain diffusers samples, on machines where this project is not installed."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from omegaconf import DictConfig, OmegaConf

from diffusion.preconditioning import ResidualEpsilon
from launch.cards import readme
from launch.folder import RunFolder
from launch.portable_student import NETWORKS, PRECONDITIONINGS, Student
from launch.teachers import students_teacher
from lightning_modules import Method
from metrics.records import Record
from networks.diffusers_unet import DiffusersUNet
from networks.weights import PROJECT_ROOT, save_weights

_PREFIX = "stillhouse_"  # diffusers puts the modules of all local folders into one package
_IMPORT = re.compile(r"^from (networks|diffusion)\.(\w+) import", re.MULTILINE)
_PROBES = 2  # samples that the copy has to share with the original
_TOLERANCE = 1e-4


def check_target(path: str | Path) -> Path:
    """Errors: ValueError for a path where something is already."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"export={path} exists already; choose another folder, or remove it")
    return path


def portable(method: Method, stored: DictConfig, num_classes: int) -> Student:
    """The student as it samples now, on the CPU, with its own copy of the weights.

    Errors: ValueError for a method that does not say in numbers how it is sampled, or parts that diffusers can't be given.
    """
    config = students_teacher(stored)
    parts = {}
    for part, known in (("network", NETWORKS), ("preconditioning", PRECONDITIONINGS)):
        options = dict(config[part])
        name = str(options.pop("_target_")).rpartition(".")[2]
        if name not in known:
            raise ValueError(f"export: {name} is not among the parts that a folder can carry ({', '.join(known)})")
        parts[part] = {"name": name, **options}
    sampling = method.sampling()
    student = Student(
        **parts,
        one_step=isinstance(method.student.preconditioning, ResidualEpsilon),
        sampling=vars(sampling) | {"options": dict(sampling.options), "sigmas": list(sampling.sigmas)},
        num_classes=num_classes,
    )
    student.denoiser.network.load_state_dict(method.exported())
    check_alike(student, method)
    return student.eval()


@torch.no_grad()
def check_alike(student: Student, method: Method) -> None:
    """Errors: RuntimeError where the copy samples other images than the method: the folder would hold another student."""
    noise, labels = student.inputs(torch.arange(_PROBES))
    device = next(method.student.parameters()).device
    theirs = method.sample(noise.to(device), None if labels is None else labels.to(device))
    ours = student.to(device).generate(noise.to(device), None if labels is None else labels.to(device))
    student.to("cpu")
    worst = (ours - theirs).abs().max().item()
    if not worst < _TOLERANCE:
        raise RuntimeError(f"the exported copy's images differ from those of {method.name} by {worst:.2g}")


def export(
    target: str | Path, student: Student, method: Method, folder: RunFolder, weights: str, records: Sequence[Record]
) -> None:
    """Write the folder, whole or not at all: pipeline, weights, the run's config, and README.md as its card.

    weights: the name of the student's weights. records: its measurements, and those that belong beside them.
    Errors: ValueError for an occupied `target`, OSError where the disk refuses.
    """
    target = check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
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
        card = {"run": folder.name, "method": method.name, "weights": weights, "licence": method.licence}
        save_weights(temporary / "student.safetensors", student.denoiser.network.state_dict(), card)
        for path in temporary.glob("*/*.safetensors"):
            shutil.copymode(path.with_name("config.json"), path)  # its owner alone could read it
        stored = folder.read_config()
        (temporary / "config.yaml").write_text(OmegaConf.to_yaml(stored))
        (temporary / "README.md").write_text(readme(student, method, stored, weights, method.licence, records))
        if (PROJECT_ROOT / "LICENSE").is_file():
            shutil.copyfile(PROJECT_ROOT / "LICENSE", temporary / "LICENSE-code")
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error}; free some space there or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plain_unet(network: DiffusersUNet) -> diffusers.UNet2DModel:
    """The network as diffusers' own, of unit noise at a time index as there; a copy."""
    unet = diffusers.UNet2DModel(**network.config)
    state = {re.sub(r"^embed\.layer", "time_embedding.linear_", name): t for name, t in network.state_dict().items()}
    unet.load_state_dict(state)
    return unet


def copy_modules(folder: Path) -> None:
    """stillhouse_student.py and every module of this project that it needs, with imports of each other alone."""
    root = Path(__file__).with_name("portable_student.py")
    texts: dict[str, str] = {}
    waiting = [("student", root)]
    while waiting:
        name, path = waiting.pop()
        if name in texts:
            continue
        text = path.read_text()
        texts[name] = _IMPORT.sub(rf"from .{_PREFIX}\2 import", text)
        waiting += [(module, PROJECT_ROOT / room / f"{module}.py") for room, module in _IMPORT.findall(text)]
    # Of a local folder diffusers copies only the modules that the first one names, not those that these name.
    others = sorted(set(texts) - {"student"})
    named = [f"from .{_PREFIX}{name} import __name__ as _{name}  # noqa" for name in others]
    texts["student"] = "\n".join(
        [texts["student"].rstrip(), "", "# For diffusers, which copies what is named here.", *named, ""]
    )
    for name, text in texts.items():
        (folder / f"{_PREFIX}{name}.py").write_text(text)
