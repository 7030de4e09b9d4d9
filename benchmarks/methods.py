"""One training step of every method at the sizes of published teachers: seconds, network evaluations, peak memory."""

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.cases import Case, compose_config
from benchmarks.loader import Synthetic
from benchmarks.measuring import clock, peak_memory, summary
from launch.errors import quiet
from launch.run.build import build_seeded, build_stages, build_trainer, fit_stages
from launch.run.folder import RunFolder
from lightning_modules import Method
from stillhouse.diffusion.denoiser import Denoiser

CYCLE = 2  # steps after which every method here has done all that it does: both updates of score distillation
# Samples of the teacher, few and coarse.
_STORED = (
    "method.pairs=4",
    "method.held_out=4",
    "teacher.solver=euler",
    "teacher.solver_options=null",
    "teacher.steps=2",
)
# Name -> options. "degradation" is DisBack's first stage, which `disback` goes through too, unmeasured.
METHODS: dict[str, tuple[str, ...]] = {
    "pretrain": ("method=pretrain",),
    "denoising_student": ("method=denoising_student", *_STORED),
    "diff_instruct": ("method=diff_instruct",),
    "diff_instruct, two_sided": ("method=diff_instruct", "method.two_sided=true"),
    "sid": ("method=sid",),
    "sid, checkpointing": ("method=sid", "method.checkpointing=true"),
    "sida": ("method=sida",),
    "dmd2": ("method=dmd2", "method.fake_updates=1"),
    "dmd2, two steps, js": ("method=dmd2", "method.fake_updates=1", "method.steps=2", "method.divergence=js"),
    "moment_matching": ("method=moment_matching",),
    "degradation": ("method=disback", "method.nodes=1"),
    "disback": ("method=disback", "method.nodes=1", "method.degradation.steps=1"),
    "consistency_distillation": ("method=consistency_distillation", "method.target_halflife=1"),
    "ect": ("method=ect",),
    "ect, teacher_step=heun": ("method=ect", "method.teacher_step=heun"),
    "tcm": ("method=tcm", "teacher.solver=renoising", "teacher.solver_options=null"),
    "cmt": ("method=cmt", "method.pairs=4", "method.held_out=4", "method.steps=2"),
    "scm": ("method=scm",),
    "scm, target=data, finite": ("method=scm", "method.target=data", "method.derivative=finite"),
    "mean_flow": ("method=mean_flow",),
    "mean_flow, target=data, finite": ("method=mean_flow", "method.target=data", "method.derivative=finite"),
    "imm": ("method=imm",),
    "progressive": ("method=progressive", "method.start_steps=2"),  # one round, which has no stages
    "sfd": ("method=sfd",),
    "b_dense on denoising_student": ("method=b_dense", "host=denoising_student", *_STORED),
    "b_dense on progressive": ("method=b_dense", "host=progressive", "method.start_steps=2"),
    "b_dense on sfd": ("method=b_dense", "host=sfd"),
    "rectified_flow": ("method=rectified_flow",),
    "reflow": ("method=reflow", *_STORED),
    "flow_distill": ("method=flow_distill", *_STORED),
    "bezier": ("method=bezier", *_STORED),
}
_RANDOM = ("~recipe", "batch_size=4", "teacher.weights=null", "teacher.sha256=null")
CIFAR10 = Case(
    "EDM's CIFAR-10 architecture (DDPM++)",
    overrides=("data=cifar10", *_RANDOM, "teacher.network.channel_mult=[2,2,2]"),  # the flows' published one is another
    cycle_rounds=3,
)
IMAGENET64 = Case("EDM's ImageNet 64x64 architecture (ADM)", overrides=("data=imagenet64", *_RANDOM), cycle_rounds=2)

Evaluations = Counter[tuple[str, bool]]
"""Per image of the batch, by (network, whether a gradient can flow back)."""


class StepTimer(pl.Callback):
    """Times the trainer's steps, each with the network evaluations that it made, from inside one `fit`."""

    def __init__(self):
        self.steps: list[tuple[float, Evaluations]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rows: Evaluations = Counter()
        for name, network in networks(pl_module):
            network.register_forward_hook(self._counter(name))
        self._begun = clock(pl_module.device)

    def _counter(self, name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def count(network: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self._rows[name, first.requires_grad] += len(inputs[0])

        return count

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = clock(pl_module.device) - self._begun
        size = pl_module.batch_size
        self.steps.append((seconds, Counter({key: rows / size for key, rows in self._rows.items()})))
        self._rows.clear()
        self._begun = clock(pl_module.device)


def networks(method: Method) -> Iterator[tuple[str, nn.Module]]:
    """The networks that a method evaluates in training, once each."""
    seen: set[nn.Module] = set()
    for name, trained in method.trained_networks().items():
        for denoiser in [module for module in trained.modules() if isinstance(module, Denoiser)][:1]:
            seen.add(denoiser.network)
            yield name, denoiser.network
    for value in (*vars(method).values(), *method.children()):
        for network in value if isinstance(value, list) else [value]:
            denoiser = getattr(network, "denoiser", network)
            if isinstance(denoiser, Denoiser) and denoiser.network not in seen:
                seen.add(denoiser.network)
                yield "teacher", denoiser.network


def measure(
    case: Case,
    methods: dict[str, tuple[str, ...]] = METHODS,
    precisions: tuple[str, ...] = ("32-true", "bf16-mixed"),
) -> dict[str, Any]:
    """An entry for each method and precision, each measured in a new process; one that was killed says so."""
    entries = []
    for name, options in methods.items():
        for precision in precisions:
            figures = in_new_process(measure_one, case, name, options, precision)
            entries.append({"method": name, "precision": precision, **(figures or {"killed": True})})
    return {"title": f"a training step of each method, {case.title}, random weights", "methods": entries}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function gives in a fresh process, whose peak memory is its own; None where that was killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        try:
            return child.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def measure_one(case: Case, name: str, options: Sequence[str], precision: str) -> dict[str, Any]:
    """Train one method for a few steps, in a temporary folder of a few networks' size.

    Raises:
        RuntimeError: Where the method's `evaluations` are not what was counted.
    """
    quiet()
    steps, timer = CYCLE * (1 + case.cycle_rounds), StepTimer()
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        method, data, trainer = prepared(config(case, folder, *options, f"trainer.precision={precision}"), name, steps)
        trainer.callbacks.append(timer)
        trainer.fit(method, data)
    figures = summarised(timer.steps[CYCLE:steps])
    counted, declared = (sum(counts.values()) for counts in (figures["evaluations_per_image"], method.evaluations))
    if not math.isclose(counted, declared):
        raise RuntimeError(
            f"{name} makes {counted:g} network evaluations per image, but its `evaluations`, which plan=true shows, sum to "
            f"{declared:g}: correct them"
        )
    return {
        "device": str(trainer.strategy.root_device),
        "batch_size": method.batch_size,
        "parameters": sum(p.numel() for p in method.student.network.parameters()),
        **figures,
        "peak_gib": peak_memory() / 2**30,
    }


def prepared(cfg: DictConfig, name: str, steps: int) -> tuple[Method, pl.LightningDataModule, pl.Trainer]:
    """A method of `METHODS`, its data, and a trainer of `steps` steps; stages before it are trained."""
    images = synthetic(cfg.data, cfg.data.root)
    method, run = build_seeded(cfg.method, cfg.seed), RunFolder(cfg.folder)
    if hasattr(method, "pairs"):  # stored samples of the teacher: in batches of the training's size, whose peak it is
        method.pairs |= dict.fromkeys(("shard_size", "sampling_batch"), cfg.batch_size)
    data = method.training_data(images)
    if name == "degradation":
        method.recording["steps"] = steps + 1
    stages = build_stages(cfg, method, images, run)
    if name == "degradation":
        return stages[0].method, stages[0].data, stages[0].trainer
    fit_stages(stages, method, run)
    method.total_steps = steps
    return method, data, build_trainer(cfg, method, run)


def config(case: Case, folder: str, *options: str) -> DictConfig:
    """As `compose_config`, without checkpoints, and with the case's network as both of several teachers."""
    options = (*options, "callbacks.checkpoints=null")
    if "method=bezier" in options:
        teacher = compose_config(case, folder, "method=reflow", *_STORED).teacher
        plain = tuple(option for option in case.overrides if not option.startswith("teacher."))
        left = [option for option in options if not option.startswith("teacher.")]
        cfg = compose_config(replace(case, overrides=plain), folder, *left)
        cfg.method.teachers = [teacher, teacher]
    else:
        cfg = compose_config(case, folder, *options)
    if "store" in cfg.method:
        cfg.method.store = f"{folder}/store"
    return cfg


def synthetic(data: DictConfig, folder: str) -> Synthetic:
    """A few images of random pixels, as a data config describes them."""
    classes = data.num_classes if data.conditional else 0
    return Synthetic(folder, 64, data.batch_size, data.resolution, data.channels, classes)


def summarised(steps: list[tuple[float, Evaluations]]) -> dict[str, Any]:
    """Seconds of a step, mean of each cycle, and of each kind of update; network evaluations per image of the training."""
    cycles = [steps[i : i + CYCLE] for i in range(0, len(steps), CYCLE)]
    kinds: dict[frozenset, list[float]] = {}
    for seconds, evaluations in steps:
        kinds.setdefault(frozenset(evaluations.items()), []).append(seconds)
    total = sum((evaluations for _, evaluations in steps), Counter())
    return {
        "seconds_per_step": summary([statistics.mean(seconds for seconds, _ in cycle) for cycle in cycles]),
        "evaluations_per_image": {_label(key): count / len(steps) for key, count in sorted(total.items())},
        "updates": [
            {"seconds": summary(seconds), "evaluations": {_label(key): count for key, count in sorted(kind)}}
            for kind, seconds in kinds.items()
        ],
    }


def _label(key: tuple[str, bool]) -> str:
    name, with_gradient = key
    return f"{name} with gradient" if with_gradient else name


def table(result: dict[str, Any]) -> str:
    """For people: one line for each method and precision, and below it one for each of its kinds of update where they differ."""
    first = next(entry for entry in result["methods"] if "killed" not in entry)
    batch, size = first["batch_size"], first["parameters"] / 1e6
    lines = [
        result["title"],
        f"  {first['device']}, batch {batch}, {size:.3g} M parameters. Seconds of an optimiser step (least .. greatest), and",
        "  per image; the process's peak of memory; network evaluations per image of the batch, * with gradient.",
    ]
    for entry in result["methods"]:
        head = f"  {entry['method']:<29}{entry['precision']:<11}"
        if "killed" in entry:
            lines.append(f"{head}killed: out of memory?")
            continue
        updates = entry["updates"] if len(entry["updates"]) > 1 else []
        counted = entry["evaluations_per_image"]
        memory = f"{entry['peak_gib']:>6.1f} GiB"
        made = "  a mean of" if updates else _counted(counted)
        lines.append(head + _line(entry["seconds_per_step"], batch, memory) + made)
        lines += [
            f"{'':<42}{_line(each['seconds'], batch, ' ' * 10)}{_counted(each['evaluations'])}" for each in updates
        ]
    return "\n".join(lines)


def _line(seconds: dict[str, float], batch: int, memory: str) -> str:
    spread = f"({seconds['min']:.3g} .. {seconds['max']:.3g})"
    return f"{seconds['median']:>7.3g} {spread:<18}{seconds['median'] / batch:>8.3g}{memory}"


def _counted(evaluations: dict[str, float]) -> str:
    parts = [f"{name.replace(' with gradient', '*')} {count:g}" for name, count in evaluations.items()]
    return "  " + ", ".join(parts)


def main() -> None:
    """Print the seconds and the peak memory of a step of some methods at EDM's CIFAR-10 size, in float32."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+", choices=METHODS, metavar="NAME")
    parser.add_argument("--batch", type=int, default=4)
    chosen = parser.parse_args()
    kept = [option for option in CIFAR10.overrides if not option.startswith("batch_size=")]
    case = replace(CIFAR10, overrides=(*kept, f"batch_size={chosen.batch}"), cycle_rounds=1)
    for entry in measure(case, {name: METHODS[name] for name in chosen.names}, ("32-true",))["methods"]:
        print({key: entry.get(key) for key in ("method", "batch_size", "seconds_per_step", "peak_gib")})


if __name__ == "__main__":
    main()
