"""plan=true: what a run needs and costs, told without starting it: no weights are loaded and nothing is sampled or written."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # as torch.export does: tensors with shapes alone

from datamodules import TrajectoryDataModule
from datamodules.storage import readable
from diffusion.denoiser import Denoiser
from launch import measure
from launch.build import build, check_fit
from launch.processes import process_count
from launch.sources import Source, exists, sources
from lightning_modules import Method
from lightning_modules.disback import Backtracking
from lightning_modules.progressive import ProgressiveDistillation

_MOMENTS = 2  # of each weight, Adam's
_FLOAT = 4  # bytes


def plan(cfg: DictConfig) -> str:
    """Lines of text for a composed config, whose teachers are expanded."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    data, method = build(cfg.data), build(_stand_in(cfg.method))
    check_fit(method, data)
    training = method.training_data(data)
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
    before, each = evaluations_before(method, training), method.evaluations
    kimg = method.total_steps * cfg.batch_size / 1000
    lines = {
        f"{cfg.folder}: {method.total_steps:,} steps of {cfg.batch_size} images ({share} on each of {processes} devices), "
        f"{kimg:,.6g} kimg": [],
        "missing": missing(cfg, config, data, training is data) or ["nothing"],
        "parameters": [
            f"{count:,} of the student ({type(student).__name__}), {networks.trained} such networks trained"
        ],
        "memory of each device, an estimate"
        + (f" in {cfg.trainer.precision}" if mixed else " in float32 (bf16-mixed: about half of the activations)"): [
            f"{readable(_FLOAT * count * networks.held)} for weights, gradients, Adam's moments, averages and frozen networks",
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


def _images_held(micro_batch: int | str | None, share: int) -> int:
    """Images of a device's share that are in memory at once; with auto the largest number that may be tried."""
    return min(share, micro_batch) if isinstance(micro_batch, int) else share


@dataclass(frozen=True)
class Networks:
    """How many networks of the student's size a method has: with gradients, frozen, averaged."""

    trained: int
    frozen: int
    averages: int

    @classmethod
    def of(cls, method: Method, averages: int) -> "Networks":
        own = [module for module in method.modules() if isinstance(module, Denoiser)]
        trained = sum(any(p.requires_grad for p in part.parameters()) for part in own)
        target = getattr(method, "target", None)  # stands for the teacher on the device
        teachers = {target} if target else {method.teacher, *getattr(method, "teachers", [])} - {None}
        return cls(trained, len(own) - trained + len(teachers), averages)

    @property
    def held(self) -> int:
        """Their weights, gradients and moments, in sizes of one network."""
        return self.trained * (2 + _MOMENTS) + self.frozen + self.averages

    @property
    def in_checkpoint(self) -> int:
        return self.trained * (1 + _MOMENTS) + self.averages


def _disk(method: Method, training: Any, size: int, networks: Networks) -> dict[str, int]:
    """Bytes by what they are for; size: of one network."""
    checkpoint = size * networks.in_checkpoint
    found = {"last.ckpt, best.ckpt": 2 * checkpoint} if method.monitor else {"last.ckpt": checkpoint}
    found["student.safetensors"] = size
    if isinstance(method, ProgressiveDistillation):
        found[f"students of {len(method.rounds)} rounds"] = size * len(method.rounds)
    if isinstance(method, Backtracking) and method.path:
        found[f"degradation path of {method.nodes} nodes"] = size * method.nodes
    if isinstance(training, TrajectoryDataModule):
        stores = [*training.train_stores, *training.held_out_stores]
        samples = sum(len(store) for store in stores)
        found[f"{samples:,} stored samples, unless they are there"] = sum(store.estimate() for store in stores)
    return found


def evaluations_before(method: Method, training: Any) -> float:
    """Network evaluations of the method's stages and of the samples that it stores."""
    stages = method.stages().values()
    count = sum(stage.total_steps * stage.batch_size * sum(stage.evaluations.values()) for stage in stages)
    if isinstance(training, TrajectoryDataModule):
        count += sum(len(store) * store.teacher.nfe() for store in (*training.train_stores, *training.held_out_stores))
    return count


def missing(cfg: DictConfig, config: dict[str, Any], data: Any, needs_images: bool) -> list[str]:
    """What has to be there before the run can start, each with the way to get it."""
    needed = {source.file: source for source in sources(config) if source.missing}
    lines = [_how(source) for source in needed.values()]
    for node in _teachers(cfg.method):
        source = node.get("source") or {}
        if node.weights is None or exists(Path(node.weights)) or source.get("url"):
            continue
        if not (source and exists(Path(source.file))):
            places = [str(node.weights), *([source.file] if source else [])]
            lines.append(f"teacher {node.name}: no {' or '.join(places)}; train one, or put the file there")
    for look in (
        *([data.check_source] if needs_images or measure.needs_images(cfg.evaluation) else []),
        lambda: build(cfg.evaluation),
    ):
        try:
            look()
        except Exception as error:
            cause = error.__cause__ if isinstance(error.__cause__, FileNotFoundError) else error
            if not isinstance(cause, FileNotFoundError):
                raise
            if not any(source.url in str(cause) for source in needed.values()):
                lines.append(str(cause))
    return lines


def _how(source: Source) -> str:
    return f"{source.option}: {source.file}; add download=true to fetch {source.url}, or put the file there"


def _teachers(method: DictConfig) -> list[DictConfig]:
    return list(method.teachers) if "teachers" in method else [method.teacher]


def _stand_in(method: DictConfig) -> DictConfig:
    """The method's config with tiny networks without weights: what it is made of can be counted at once."""
    method = copy.deepcopy(method)
    OmegaConf.resolve(method)
    for teacher in _teachers(method):
        network = teacher.network
        kept = {key: network.get(key, 0) for key in ("resolution", "in_channels", "out_channels", "num_classes")}
        options = {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
        teacher.network = {"_target_": "networks.SongUNet", **kept, **options}
        teacher.weights = teacher.sha256 = None
    if "lpips" in str(method.get("loss")):
        method.loss = "l2"
    return method


def _saved_bytes(network: nn.Module, data: Any) -> int:
    """Bytes that autograd keeps of one image's evaluation, beside the weights."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()  # what several layers keep is there once
        return tensor

    x = torch.zeros(1, network.in_channels, network.resolution, network.resolution)
    labels = torch.zeros(1, dtype=torch.int64) if data.num_classes else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(x, torch.ones(1), labels)  # held, so that no two storages share an address
    del out
    return sum(kept.values())
