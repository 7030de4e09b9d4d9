"""Every method on every data set with a teacher of every family: two training steps and a sample of each.

python tests/support_matrix.py [METHOD ...] runs all of them, or those of some methods ("b_dense sfd" is one), and writes
results/support.json, of which the table in docs/data.md is made. The test suite runs a part that has every pair of two choices.
Networks are shrunken; data are small files in their published layouts.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from published_files import PUBLISHED

from callbacks.network_layout import all_denoisers
from launch.run.build import build, build_seeded, build_stages, build_trainer, check_fit, fit_stages
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from launch.run.plan import plan
from launch.run.teachers import expand_teachers
from lightning_modules import Method
from stillhouse.files import write_file
from stillhouse.networks.branching import BranchedConv2d

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS = 4, 2
TRAINED = "trained"
METHODS = {
    "pretrain": [],
    "denoising_student": ["method.pairs=8", "method.held_out=4"],
    "diff_instruct": ["method.fake_updates=1"],  # so that two steps are a turn of each
    "disback": [
        "method.fake_updates=1",
        "method.nodes=1",
        "method.degradation={steps:2,lr:null,batch_size:4,seed:0,spacing:geometric}",
    ],
    "sid": ["method.fake_updates=1"],
    "sida": ["method.fake_updates=1", "method.generator_kimg=0", "method.gan_kimg=0"],
    "dmd2": ["method.fake_updates=1", "method.steps=2", "method.divergence=js"],
    "moment_matching": ["method.steps=2"],
    "consistency_distillation": ["method.target_halflife=0.01", "method.loss=huber"],
    "ect": [],
    # In two steps a planar flow's student would not change with it.
    "scm": ["method.tangent_warmup_kimg=0"],
    "mean_flow": [],
    "imm": ["method.group_size=2"],
    "tcm": ["teacher.solver=renoising", "teacher.solver_options=null"],
    "cmt": ["method.pairs=8", "method.held_out=4", "method.loss=l2", "method.steps=2"],
    "progressive": ["method.start_steps=4", "method.end_steps=1"],
    "sfd": ["method.steps=2"],
    "b_dense sfd": ["method.steps=2"],
    "b_dense progressive": ["method.start_steps=4", "method.end_steps=1"],
    "b_dense denoising_student": ["method.pairs=8", "method.held_out=4", "method.branches=2"],
    "rectified_flow": [],
    "reflow": ["method.pairs=8", "method.held_out=4"],
    "flow_distill": ["method.pairs=8", "method.held_out=4", "method.loss=l2"],
    "bezier": ["method.pairs=8", "method.held_out=4", "method.loss=l2"],
}
# Each way in which they train is also another's: tests that run every method leave them to `make test-all`.
TWINS = (
    "sid",
    "moment_matching",
    "scm",
    "imm",
    "tcm",
    "cmt",
    "b_dense sfd",
    "b_dense progressive",
    "b_dense denoising_student",
    "reflow",  # bezier's drift fit, bit for bit
    "flow_distill",  # bezier of one teacher and order one, bit for bit
)
FAMILIES = ("edm", "ddpm", "flow")
PLANAR = ("checkerboard", "eight_gaussians")
COMMON = (
    f"batch_size={BATCH}",
    f"method.kimg={BATCH * STEPS / 1000}",
    "method.warmup_kimg=0",
    "callbacks=none",
    "callbacks.ema=null",
    "trainer.accelerator=cpu",
    "trainer.gradient_clip_val=null",
    "logger.tensorboard=null",
)


@dataclass(frozen=True)
class Case:
    method: str
    data: str
    family: str

    @property
    def teacher(self) -> str:
        """What stands for the family: of conf/teacher, with sizes that follow the data."""
        return {
            "edm": self.data if self.data in ("digits", "cifar10", "ffhq64", "imagenet64") else "scratch",
            "ddpm": "cifar10_ddpm",
            "flow": f"{self.data}_rf1" if self.data in ("digits", "cifar10") else "scratch_flow",
        }[self.family]

    @property
    def network(self) -> dict[str, Any]:
        """What shrinks it."""
        unet = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
        if self.family == "ddpm":
            return {**unet, "norm_groups": 4}
        if self.data in PLANAR:
            return {"width": 16, "num_blocks": 1}
        heads = {"channels_per_head": 8} if self.data.startswith("imagenet64") else {}
        return unet | heads

    def config(self, data_options: list[str]) -> DictConfig:
        """The run's, as train.py composes it."""
        method, _, host = self.method.partition(" ")
        bezier = self.method == "bezier"
        options = [f"method={method}", f"data={self.data}", *data_options, *COMMON, *METHODS[self.method]]
        options += [f"host={host}"] if host else []
        options += [] if bezier else [f"teacher={self.teacher}"]
        options += (
            ["method.augment=null"] if self.method == "pretrain" and self.family != "edm" else []
        )  # no labels for it
        if self.family == "ddpm":
            options.append("data.conditional=false")  # published DDPMs know no classes
            options += ["method.weighting=snr"] if "progressive" in self.method else []  # the others diverge for eps
            options += (
                ["method.sigma_init=2.5"] if self.method in ("diff_instruct", "disback", "sid", "sida", "dmd2") else []
            )  # below their highest
        cfg = compose("config", [*options, f"name={'-'.join((method, host, self.family))}"])
        with open_dict(cfg):
            if bezier:  # the same one twice, which as a new network has no name in conf/teacher that a list could hold
                same = compose("config", [f"data={self.data}", *data_options, f"teacher={self.teacher}"])
                cfg.method.teachers = [OmegaConf.to_container(same.teacher, resolve=True)] * 2
        expand_teachers(cfg)
        with open_dict(cfg):
            for teacher in cfg.method.teachers if bezier else [cfg.teacher]:
                teacher.weights, teacher.steps = None, 2
                for key, value in self.network.items():
                    OmegaConf.update(teacher.network, key, value)
        return cfg


def cases() -> list[Case]:
    return [
        Case(method, data, family)
        for data in PUBLISHED
        for method in METHODS
        for family in FAMILIES
        if not (family == "ddpm" and data in PLANAR)  # a U-Net needs more than one pixel
    ]


def covering() -> list[Case]:
    """Cases such that every family meets every method and every data set: a tenth of all."""
    chosen = []
    for shift, family in enumerate(FAMILIES):
        data = [name for name in PUBLISHED if not (family == "ddpm" and name in PLANAR)]
        # Shifted, so that a method meets other data sets in the next family.
        chosen += [Case(method, data[(i + 4 * shift) % len(data)], family) for i, method in enumerate(METHODS)]
    return chosen


class Counter:
    """Counts evaluated images of networks in training steps, of all denoisers of a method alike."""

    def __init__(self, method: Method):
        self.count, self.active = 0, False
        for network in {denoiser.network for denoiser in all_denoisers(method)}:
            network.register_forward_hook(self._hook)
        step = method.training_step

        def counted(*arguments):
            self.active = True
            loss = step(*arguments)
            self.active = False
            return loss

        method.training_step = counted

    def _hook(self, network, inputs, output) -> None:
        self.count += len(inputs[0]) if self.active else 0


def planned(case: Case, data_options: list[str]) -> str:
    """What plan=true says of the case. Errors: those of plan, which must be none."""
    return plan(case.config(data_options))


def run(case: Case, data_options: list[str]) -> None:
    """Train the case in the current folder as train.py does, sample, and compare with what the method says of its costs.

    Errors: whatever goes wrong; AssertionError for samples that are odd and evaluations that were not announced.
    """
    cfg = case.config(data_options)
    data, method = build(cfg.data), build_seeded(cfg.method, cfg.seed)
    check_fit(method, data)
    training = method.training_data(data)
    folder = RunFolder(cfg.folder)
    data.check_source()
    stages = build_stages(cfg, method, data, folder)
    trainer = build_trainer(cfg, method, folder)
    fit_stages(stages, method, folder)
    counter = Counter(method)
    before = [p.detach().clone() for p in method.student.parameters()]
    trainer.fit(method, training)
    assert method.steps_before + trainer.global_step == STEPS  # of all rounds of progressive distillation
    changed = any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))
    # A network of noise that begins at zero has straight paths of no length, and nothing to distil.
    assert changed or method.means["loss/student"] == 0
    announced = BATCH * trainer.global_step * sum(method.evaluations.values())
    assert counter.count == announced, f"{counter.count} evaluations, {announced} announced"
    labels = torch.tensor([0, 1]) if data.num_classes else None
    samples = method.sample(torch.randn(2, data.channels, data.resolution, data.resolution), labels)
    assert samples.shape == (2, data.channels, data.resolution, data.resolution)
    assert samples.isfinite().all()
    # The student is a network of the teacher's kind that any teacher config can load.
    plain = [m for m in method.student.network.modules() if isinstance(m, BranchedConv2d)]
    assert plain
    assert set(method.exported()) == set(method.student.network.state_dict()) - {"embed.steps.table"}


@contextmanager
def published(data: str, folder: Path) -> Iterator[list[str]]:
    """Within, the current folder has the data set's files; gives the options that fit them."""
    here = os.getcwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield PUBLISHED[data](Path.cwd())
    finally:
        os.chdir(here)


def main(names: Sequence[str]) -> None:
    """Run all cases, or those of some methods and data sets, and write what came out; of others the file keeps what it has."""
    import logging
    import warnings

    from results.collect import origin

    if unknown := set(names) - set(METHODS) - set(PUBLISHED):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join((*METHODS, *PUBLISHED))}")

    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    register_resolvers()
    path = ROOT / "results/support.json"
    stored = json.loads(path.read_text())["outcomes"]
    outcomes: dict[str, Any] = {method: {data: {} for data in PUBLISHED} for method in METHODS}
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for data in PUBLISHED:
            with published(data, Path(folder) / data) as options:
                for case in (case for case in cases() if case.data == data):
                    if names and not {case.method, data}.intersection(names):
                        found = stored.get(case.method, {}).get(data, {}).get(case.family, "never run")
                    else:
                        found = outcome(case, options)
                        print(case.method, data, case.family, found, flush=True)
                    outcomes[case.method][data][case.family] = found
    content = {**origin(), "steps": STEPS, "outcomes": outcomes}
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def outcome(case: Case, data_options: list[str]) -> str:
    try:
        run(case, data_options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return TRAINED


if __name__ == "__main__":
    main(sys.argv[1:])
