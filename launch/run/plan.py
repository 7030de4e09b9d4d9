"""plan=true: what a run needs and costs, without starting it: no weights are loaded, and nothing is sampled or written."""

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # as torch.export does: tensors with shapes alone

from datamodules import TrajectoryDataModule
from datamodules.components.disk_space import readable
from launch.evaluate import measure
from launch.run.build import build, build_seeded, build_stages, build_trainer, check_fit
from launch.run.folder import RunFolder
from launch.run.precision import device_kind
from launch.run.processes import process_count
from launch.run.remote_files import RemoteFile, exists, remote_files
from launch.run.trainer_options import choose_channels_last
from lightning_modules import Method
from stillhouse.checkpoints.weights import did_you_mean, load_weights
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.teacher import Teacher

_MOMENTS = 2  # of each weight, Adam's
_FLOAT = 4  # bytes


def plan(cfg: DictConfig) -> str:
    """Lines of text for a composed config, whose teachers are expanded.

    The run's own objects are built, with networks that have no memory, so that what the run would refuse is refused here:
    all but what this machine lacks, since the run may be for another one.

    Raises:
        ValueError, OSError: As the run.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    data, method = build(cfg.data), build_weightless(cfg.method, cfg.seed)
    check_fit(method, data)
    training = method.training_data(data)
    without_evaluation = _missing_file_message(lambda: measure.checked(build(cfg.evaluation), data))
    _try_trainers(cfg, method, data, measurable=without_evaluation is None)
    with FakeTensorMode():
        student = build(
            _teachers(cfg.method)[-1].network
        )  # of several teachers the last one is the student's beginning
        activations = _saved_bytes(student, data)
    count = sum(p.numel() for p in student.parameters())
    processes = process_count(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.accelerator)
    share = math.ceil(cfg.batch_size / processes)
    held, mixed = _images_held(cfg.trainer.micro_batch, share), cfg.trainer.precision.endswith("-mixed")
    kept = held * activations // (2 if mixed else 1)
    averages = len(cfg.callbacks.ema.averages) if cfg.callbacks.get("ema") else 0
    networks = Networks.of(method, averages)
    weights = int(_FLOAT * count * networks.held(mixed))
    before, each = evaluations_before(method, training), method.evaluations
    kimg = method.total_steps * cfg.batch_size / 1000
    lines = {
        f"{cfg.folder}: {method.total_steps:,} steps of {cfg.batch_size} images ({share} on each of {processes} devices), "
        f"{kimg:,.6g} kimg": [
            f"after {name}: {stage.total_steps:,} steps of {stage.batch_size} images"
            for name, stage in method.stages().items()
        ],
        "missing": missing(cfg, config, data, training is data, without_evaluation) or ["nothing"],
        **({"data": [table]} if (table := data.class_table()) is not None else {}),
        "parameters": [
            f"{count:,} of the student ({type(student).__name__}), trained networks of this kind: {networks.trained}"
        ],
        "layout": [_layout(cfg.trainer)],
        "memory of each device, an estimate"
        + (f" in {cfg.trainer.precision}" if mixed else " in float32 (bf16-mixed: about half of the activations)"): [
            f"{readable(weights)} for weights, gradients, Adam's moments, averages and frozen networks",
            f"{readable(kept)} for what one evaluation of {held} images keeps for its backward pass",
        ],
        "disk": [
            f"{readable(size)} {what}" for what, size in _disk(method, training, _FLOAT * count, networks).items()
        ],
        "network evaluations": [
            *([f"{before:,.0f} before the first step"] if before else []),
            f"{1000 * sum(each.values()):,.0f} per kimg: "
            + ", ".join(f"{1000 * number:,.0f} {name}" for name, number in each.items()),
            f"{method.nfe} of a sample",
        ],
    }
    return "\n".join(line for head, body in lines.items() for line in (head, *(f"  {one}" for one in body)))


def _layout(trainer: DictConfig) -> str:
    """How images lie in memory, with what decides it."""
    chosen = trainer.accelerator in ("gpu", "cuda")  # for another machine, if there is none here
    device = "cuda" if chosen else device_kind(trainer.accelerator)[0]
    innermost = choose_channels_last(trainer.channels_last, device, trainer.precision, trainer.compile)
    where = f", for {trainer.precision} on a {'GPU' if device == 'cuda' else 'CPU'}" + (
        ", compiled" if trainer.compile else ""
    )
    return f"{'channels-last' if innermost else 'contiguous'} (trainer.channels_last={trainer.channels_last}{where})"


def _images_held(micro_batch: int | str | None, share: int) -> int:
    """Images of a device's share that are in memory at once; with auto the largest number that may be tried."""
    return min(share, micro_batch) if isinstance(micro_batch, int) else share


@dataclass(frozen=True)
class Networks:
    """How many networks of the student's size a method has: with gradients, its own without, frozen teachers, averaged."""

    trained: int
    targets: int
    frozen: int
    averages: int

    @classmethod
    def of(cls, method: Method, averages: int) -> "Networks":
        denoisers = [module for module in method.modules() if isinstance(module, Denoiser)]
        trained = sum(any(p.requires_grad for p in part.parameters()) for part in denoisers)
        teachers = [network for network in method.frozen_networks() if isinstance(network, Teacher)]
        frozen = sum(len(teacher.denoisers) for teacher in teachers)
        return cls(trained, len(denoisers) - trained, frozen, averages)

    def held(self, mixed: bool) -> float:
        """Their weights, gradients and moments, in sizes of one network; mixed: frozen weights rounded to 2 bytes beside."""
        frozen = self.targets + self.frozen * (1.5 if mixed else 1)
        return self.trained * (2 + _MOMENTS) + frozen + self.averages

    @property
    def in_checkpoint(self) -> int:
        return self.trained * (1 + _MOMENTS) + self.targets + self.averages


def _disk(method: Method, training: Any, size: int, networks: Networks) -> dict[str, int]:
    """Bytes by what they are for; size: of one network."""
    checkpoint = size * networks.in_checkpoint
    sizes = {"last.ckpt, best.ckpt": 2 * checkpoint} if method.monitor else {"last.ckpt": checkpoint}
    sizes["student.safetensors"] = size
    sizes |= method.stored_bytes(size)
    if isinstance(training, TrajectoryDataModule):
        stores = [*training.train_stores, *training.held_out_stores]
        samples = sum(len(store) for store in stores)
        sizes[f"{samples:,} stored samples, unless they are there"] = sum(store.estimate() for store in stores)
    return sizes


def evaluations_before(method: Method, training: Any) -> float:
    """Network evaluations of the method's stages and of the samples that it stores."""
    stages = method.stages().values()
    count = sum(stage.total_steps * stage.batch_size * sum(stage.evaluations.values()) for stage in stages)
    if isinstance(training, TrajectoryDataModule):
        count += sum(len(store) * store.teacher.nfe() for store in (*training.train_stores, *training.held_out_stores))
    return count


def missing(
    cfg: DictConfig, config: dict[str, Any], data: Any, needs_images: bool, without_evaluation: str | None
) -> list[str]:
    """What has to be there before the run can start, each with the way to get it.

    without_evaluation: what the evaluation says of a file that it lacks, if it does.
    """
    needed = {source.file: source for source in remote_files(config) if source.missing}
    lines = [_how(source) for source in needed.values()]
    for node in _with_guides(_teachers(cfg.method)):
        source = node.get("source") or {}
        if node.weights is None or exists(Path(node.weights)) or source.get("url"):
            continue
        if not (source and exists(Path(source.file))):
            places = [str(node.weights), *([source.file] if source else [])]
            lines.append(
                f"teacher {node.name}: no {' or '.join(places)}{did_you_mean(node.weights)}; train one, or put the file there"
            )
    without_images = (
        _missing_file_message(data.check_source) if needs_images or measure.needs_images(cfg.evaluation) else None
    )
    absent = [text for text in (without_images, without_evaluation) if text is not None]
    return lines + [text for text in absent if not any(source.url in text for source in needed.values())]


def _missing_file_message(build_or_check: Callable[[], object]) -> str | None:
    """Return the message of `build_or_check` about a missing file; None where it misses none. Other errors pass."""
    try:
        build_or_check()
    except Exception as error:
        if (absent := _missing_file_error(error)) is None:
            raise
        return str(absent)
    return None


def _missing_file_error(error: BaseException) -> FileNotFoundError | None:
    """The error of a file that is not there, which Hydra may have wrapped."""
    return next((one for one in (error, error.__cause__) if isinstance(one, FileNotFoundError)), None)


def _try_trainers(cfg: DictConfig, method: Method, data: Any, measurable: bool) -> None:
    """Build what trains the run and its stages, callbacks and loggers among it, as far as that needs no file that is missing.

    Raises:
        ValueError, OSError: As a run, but for what this machine lacks.
    """
    with tempfile.TemporaryDirectory() as scratch:  # some loggers write at once
        cfg = copy.deepcopy(cfg)
        cfg.folder = scratch
        if not measurable:
            cfg.evaluation.update(extractor={"_target_": "stillhouse.metrics.extractors.Digits"}, reference=None)
        build_stages(cfg, method, data, RunFolder(scratch), here=False)
        build_trainer(cfg, method, RunFolder(scratch), here=False)


def _how(source: RemoteFile) -> str:
    return f"{source.option}: {source.file}; add download=true to fetch {source.url}, or put the file there"


def _teachers(method: DictConfig) -> list[DictConfig]:
    return list(method.teachers) if "teachers" in method else [method.teacher]


def _with_guides(teachers: Sequence[DictConfig]) -> list[DictConfig]:
    return [*teachers, *(teacher.guide for teacher in teachers if teacher.get("guide"))]


def build_weightless(config: DictConfig, seed: int) -> Method:
    """Build the method with networks that have shapes alone; of its errors those of missing files do not pass."""
    config = weightless(config)
    try:
        return build_seeded(config, seed)
    except Exception as error:
        if _missing_file_error(error) is None or "lpips" not in str(config.get("loss")):
            raise
        config.loss = "l2"  # what LPIPS is for was checked before its weights were looked for, and `missing` lists them
        return build_seeded(config, seed)


def weightless(method: DictConfig) -> DictConfig:
    """The method's config with the networks of its teachers built on the meta device: shapes without memory.

    Weights that are there are checked against the network, and not kept; `missing` lists those that are not.
    """
    method = copy.deepcopy(method)
    OmegaConf.resolve(method)
    method._set_flag("allow_objects", True)
    for teacher in _with_guides(_teachers(method)):
        with torch.device("meta"):
            network = build(teacher.network)
        if teacher.get("weights") and exists(Path(teacher.weights)):
            with warnings.catch_warnings(action="ignore"):  # torch, of weights that have nowhere to go
                load_weights(teacher.weights, network, teacher.get("sha256"))
        teacher.network = network
        teacher.weights = teacher.sha256 = None
    return method


def _saved_bytes(network: nn.Module, data: Any) -> int:
    """Bytes that autograd keeps of one image's evaluation, beside the weights."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()  # what several layers keep is there once
        return tensor

    x = torch.zeros(1, network.in_channels, network.resolution, network.resolution)
    labels = torch.zeros(1, dtype=torch.int64) if data.num_classes else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(x, torch.ones(1), labels)  # held, so that no two storages share an address
    del out
    return sum(kept.values())
