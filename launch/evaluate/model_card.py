"""The README.md of an exported student, which is also its card on a model hub."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from launch.evaluate.portable_student import Student
from launch.evaluate.trained_run import TrainedRun
from stillhouse.analysis.tables import markdown_table, records_markdown
from stillhouse.diffusion.sampling import Sampling
from stillhouse.metrics.records import Record
from stillhouse.networks.diffusers_unet import DiffusersUNet

_USE = """\
```python
import torch
from diffusers import DiffusionPipeline

folder = "."  # this folder
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(seeds=[0, 1, 2]).images  # image i is a function of seed i alone
images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).images
tensors = pipe(seeds=range(4), output_type="pt").images  # float32 in about [-1, 1]
```

It needs torch, numpy and diffusers; `trust_remote_code` lets it run the Python files in this folder, which you can read. The
network computes in float32. In Stillhouse, `student.safetensors` is a teacher's `weights`.
"""

_UNET = """\
`unet` holds the network alone, for `UNet2DModel.from_pretrained(folder, subfolder="unet")`; its predictions become images in
`student/stillhouse_preconditioning.py`.
"""


def readme(student: Student, run: TrainedRun, records: Sequence[Record]) -> str:
    """Return the card's text.

    Args:
        student: What is exported.
        run: Where it comes from.
        records: The student's measurements, and those that belong beside them.
    """
    method, licence = run.method, run.method.licence
    path: Sampling = student.path
    config = OmegaConf.to_container(run.config)
    guidance = f", {method.teacher.guidance_name}" if method.teacher and method.teacher.guided else ""
    teacher = "trained on images"
    if method.teacher in method.learned_teachers():
        teacher = f"distilled from the teacher `{method.teacher.name}`{guidance}"
    elif method.teacher:
        teacher = f"trained from the weights of `{method.teacher.name}`, on images,"
    labels = f", conditioned on {student.num_classes} classes" if student.num_classes else ""
    channels, side, _ = student.image_shape
    kind = {1: "grey", 2: "points of the plane", 3: "RGB"}.get(channels, f"{channels} channels")
    facts = [
        ("method", method.name),
        ("data", f"{config['data']['name']}, {side}x{side}, {kind}{labels}"),
        ("teacher", f"{method.teacher.name}{guidance}" if method.teacher else "none"),
        ("network evaluations per image (NFE)", str(method.nfe)),
        (
            "sampling",
            f"{path.solver} over noise levels {', '.join(f'{sigma:.4g}' for sigma in _shortened(path.sigmas))}",
        ),
        ("weights", f"{run.weights.name}, {sum(p.numel() for p in student.parameters()):,} parameters"),
        ("training", f"{_steps(run)} steps of {method.batch_size} images, seed {method.seed}"),
        ("licence of the weights", licence),
    ]
    measured = records_markdown(records) if records else "Not measured."
    return "\n".join(
        [
            "---",
            f"license: {_tag(licence)}",
            "library_name: diffusers",
            "tags: [diffusion-distillation, stillhouse]",
            "---",
            "",
            f"# {config['name']}",
            "",
            f"A {method.nfe}-step student for {config['data']['name']}, {teacher} by `{method.name}`.",
            "",
            _licence_note(licence),
            "",
            *markdown_table([["", ""], *map(list, facts)]),
            "",
            "## Use",
            "",
            _USE,
            *([_UNET] if isinstance(student.denoiser.network, DiffusersUNet) else []),
            "## Metrics",
            "",
            "Values compare only where their fingerprints agree.",
            "",
            measured,
            "",
            "The run's configuration is in `config.yaml`.",
            "",
        ]
    )


def _steps(run: TrainedRun) -> str:
    """Return the steps behind the weights: all of them, unless the run has not reached its end."""
    training = run.weights.training
    unfinished = training is not None and training["reached"] < training["total"]
    return f"{training['step']:,} of {training['total']:,}" if unfinished else f"{run.method.total_steps:,}"


def _shortened(sigmas: Sequence[float], most: int = 8) -> Sequence[float]:
    return sigmas if len(sigmas) <= most else [*sigmas[: most // 2], *sigmas[-most // 2 :]]


def _tag(licence: str) -> str:
    return "other" if " " in licence or licence == "unknown" else licence.lower()


def _licence_note(licence: str) -> str:
    code = "The code in this folder is under Apache-2.0 (LICENSE-code)"
    if "NC" in licence.upper().split("-"):
        return f"**Non-commercial use only**: the weights derive from a teacher under {licence}. {code}."
    if licence == "unknown":
        return (
            f"**The teacher's licence is not known**: ask its authors before you use or pass on these weights. {code}."
        )
    return f"The weights are under {licence}, as the teacher's. {code}."
