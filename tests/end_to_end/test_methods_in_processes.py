"""Every method in two processes: equal weights on both, different noise, and what one process with the whole batch learns.

One pair of processes goes through some of them (the others are slow), and a third one does the same alone.
"""

import logging
import multiprocessing
import os
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from end_to_end_tools import read_csv
from hydra import initialize_config_dir
from process_tools import in_two_processes
from safetensors.torch import load_file
from support_matrix import METHODS, ROOT, Case

from datamodules import TrajectoryDataModule
from launch.run.build import build, build_seeded, build_stages, build_trainer, fit_stages
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from stillhouse.checkpoints.weights import hash_state

BATCH, STEPS = 8, 4
FLOWS = ("rectified_flow", "reflow", "flow_distill", "bezier")
QUICK = ("disback", "sfd")
DRAWN_BY_RANK = ("pretrain",)  # its noise comes from (seed, rank, step)
UPDATES = {"sfd": 2, "b_dense sfd": 2}  # in each training step
STRATEGIES = {"diff_instruct": ("averaged", "ddp_find_unused_parameters_true")}
# "METHOD, ..." with its options: what else the processes could change.
VARIANTS = {
    "scm, finite": ["method.derivative=finite"],
    "scm, edm2": ["teacher/network=edm2", "teacher.network.channels_per_head=8"],
    "sfd, guided": ["teacher.guidance=1.5"],
}
NAMES = (*METHODS, *VARIANTS)


def method_of(name):
    return name.partition(",")[0]


def compose(name, strategy, devices):
    method = method_of(name)
    cfg = Case(method, "digits", "flow" if method in FLOWS else "edm").config(VARIANTS.get(name, []))
    cfg.batch_size, cfg.method.kimg, cfg.method.lr = BATCH, BATCH * STEPS / 1000, 1e-5
    cfg.trainer.devices, cfg.trainer.strategy = devices, strategy if devices > 1 else "auto"
    cfg.folder, cfg.trainer.log_every_n_steps = f"runs/{name}-{strategy}", 2
    for teacher in cfg.method.teachers if name == "bezier" else [cfg.method.teacher]:
        if "guidance" not in teacher:  # which needs a network that also samples without labels
            teacher.network.label_dropout = 0  # hidden labels are drawn by each process for itself
    return cfg


def learn(name, strategy, devices):
    """Trains as train.py does; what the student's network was given in each step, the weights, and the bytes."""
    cfg = compose(name, strategy, devices)
    data, method = build(cfg.data), build_seeded(cfg.method, cfg.seed)
    with mock.patch.dict(TrajectoryDataModule.__init__.__kwdefaults__, shard_size=BATCH // 2):
        training = method.training_data(data)
    folder = RunFolder(cfg.folder)
    stages = build_stages(cfg, method, data, folder)
    trainer = build_trainer(cfg, method, folder)
    fit_stages(stages, method, folder)
    seen = {}

    def see(module, args):
        seen.setdefault(trainer.global_step, args[0].detach().clone())

    hook = method.student.network.register_forward_pre_hook(see)
    begun = hash_state(method.student)
    trainer.fit(method, training)
    hook.remove()
    networks, cycle = method.trained_networks(), method.update_cycle
    trained = {key: sum(p.numel() for p in net.parameters() if p.requires_grad) for key, net in networks.items()}
    numbers = [trained[key] for step in range(method.total_steps) for key in cycle[step % len(cycle)]]
    return {
        "seen": seen,
        "hash": hash_state(method),
        "learned": begun != hash_state(method.student),
        "state": method.state_dict(),
        "bytes": getattr(trainer.strategy, "bytes_reduced", 0),
        "steps": method.total_steps,  # of progressive distillation those of its last round
        "size": 4 * sum(numbers) * UPDATES.get(method_of(name), 1),
    }


def _work(rank, devices, folder, names):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.chdir(folder)
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name in names:
            for strategy in STRATEGIES.get(name, ("averaged",)):
                torch.save(learn(name, strategy, devices), f"{name} {strategy} {rank}.pt")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(method, strategy) -> what ranks 0 and 1 and one process alone left."""
    together, alone = (tmp_path_factory.mktemp(name) for name in ("together", "alone"))

    @cache
    def learn_all(names: tuple[str, ...]) -> None:
        single = multiprocessing.get_context("fork").Process(target=_work, args=(0, 1, alone, names))
        single.start()
        in_two_processes(_work, 2, together, names, limit=280)
        single.join(280)
        assert single.exitcode == 0

    def read(name: str, strategy: str) -> list[dict]:
        learn_all(QUICK if name in QUICK else tuple(name for name in NAMES if name not in QUICK))
        files = [(together, 0), (together, 1), (alone, 0)]
        return [torch.load(Path(folder) / f"{name} {strategy} {rank}.pt") for folder, rank in files]

    read.folders = (together, alone)
    return read


def each(left_out=()):
    """Names with their strategies; those beyond QUICK are slow."""
    for name in NAMES:
        for strategy in STRATEGIES.get(name, ("averaged",)) if name not in left_out else ():
            yield pytest.param(name, strategy, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "strategy"), each())
def test_two_processes_learn_what_one_does(learned, name, strategy):
    """Weights agree to 1e-6, but for the few whose gradient is little more than rounding, which Adam makes steps of."""
    zero, one, alone = learned(name, strategy)
    assert zero["learned"]
    assert zero["hash"] == one["hash"]  # all networks, to the last bit
    if name in DRAWN_BY_RANK:
        return
    theirs = alone["state"]
    assert zero["state"].keys() == theirs.keys()
    apart = torch.cat([(zero["state"][key] - value).abs().flatten().float() for key, value in theirs.items()])
    assert (apart > 1e-6).sum() < len(apart) / 200
    assert apart.max() <= 2.1e-5 * STEPS


@pytest.mark.parametrize(("name", "strategy"), each(left_out=DRAWN_BY_RANK))
def test_two_processes_log_what_one_does(learned, name, strategy):
    """Losses and diagnostics are those of the whole batch, in the weights' agreement."""
    steps = learned(name, strategy)[0]["steps"]
    together, alone = (read_csv(folder / f"runs/{name}-{strategy}/metrics.csv") for folder in learned.folders)
    assert [row["step"] for row in together] == [str(step) for step in range(2, steps + 1, 2)]
    assert any(key.startswith("loss/") for key in together[0])
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert float(ours[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_each_process_has_its_share_of_the_samples(learned, name):
    """What rank 0 and rank 1 train on is different, and side by side what one process trains on."""
    zero, one, alone = learned(name, "averaged")
    assert zero["seen"].keys() == one["seen"].keys() == alone["seen"].keys() == set(range(zero["steps"]))
    for step, ours in zero["seen"].items():
        theirs = one["seen"][step]
        half = len(alone["seen"][step]) // 2  # of CMT all states of half of the trajectories
        assert len(ours) == len(theirs) == half >= BATCH // 2
        assert not any(torch.equal(a, b) for a in ours for b in theirs)
        if name not in DRAWN_BY_RANK:
            torch.testing.assert_close(torch.cat([ours, theirs]), alone["seen"][step], rtol=1e-4, atol=1e-4)


def test_they_record_the_same_degradation_path(learned):
    """DisBack's first stage, of which rank zero keeps the nodes."""
    learned("disback", "averaged")
    ours, theirs = (sorted((folder / "data/degradation").rglob("*.safetensors")) for folder in learned.folders)
    assert [path.name for path in ours] == [path.name for path in theirs] == ["node-000002.safetensors"]
    apart = [(load_file(theirs[0])[key] - value).abs().max() for key, value in load_file(ours[0]).items()]
    assert max(apart) <= 4.1e-5  # two steps


@pytest.mark.parametrize(("name", "strategy"), each())
def test_no_more_is_sent_than_what_a_step_trains(learned, name, strategy):
    """Where updates alternate each is one network's; DDP sends the other's zeros too."""
    zero, one, alone = learned(name, strategy)
    assert zero["bytes"] == one["bytes"] == zero["size"] * (2 if strategy.startswith("ddp") else 1)
    assert alone["bytes"] == 0
