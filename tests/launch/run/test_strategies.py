"""What several processes average, what it costs, and that they end up equal to the last bit."""

import json
from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import torch
from process_tools import in_two_processes
from torch import nn
from torch.utils.data import DataLoader

from launch.run.strategies import AveragedGradients, CountedDDP, buckets
from stillhouse.checkpoints.weights import hash_state

STEPS = 6
A, B = 8 * 8 + 8, 8 * 4 + 4  # parameters


class Turns(pl.LightningModule):
    """Two networks in turns; one more layer, `extra`, that `where` says which rank's loss reaches."""

    def __init__(self, where: Callable[[int], bool] = lambda rank: False, parts: int = 1, start: float = 0.0):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b, self.extra = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, start)
        self.where, self.parts, self.gradients = where, parts, []

    def configure_optimizers(self):
        return (
            torch.optim.Adam([*self.a.parameters(), *self.extra.parameters()]),
            torch.optim.Adam(self.b.parameters()),
        )

    def losses(self, turn, x):
        if turn:
            return self.b(x).square().sum(1)
        loss = self.a(x).square().sum(1)
        return loss + self.extra(x).abs().sum(1) if self.where(self.global_rank) else loss

    def training_step(self, batch, batch_idx):
        turn = self.global_step % 2
        optimizer = self.optimizers()[turn]
        optimizer.zero_grad()
        x = 1.0 + torch.arange(8 * 8.0).view(8, 8).sin() * (1 + self.global_step)
        share = x.chunk(self.trainer.world_size)[self.global_rank].chunk(self.parts)
        for part in share[:-1]:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(self.losses(turn, part).sum() / 8 * self.trainer.world_size)
        self.manual_backward(self.losses(turn, share[-1]).sum() / 8 * self.trainer.world_size)
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.parameters()])
        optimizer.step()


def fit(module, folder, **options):
    pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"devices": 1} | options,
    ).fit(module, DataLoader(range(1000)))


def _two(rank, folder, strategy, where, parts):
    module = Turns(where, parts, start=float(rank))  # rank 0's beginning is for all
    used = strategy()
    fit(module, folder, strategy=used, devices=2)
    torch.save({"gradients": module.gradients, "state": module.state_dict()}, folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps({"bytes": used.bytes_reduced, "hash": hash_state(module)}))


def run(folder, strategy=AveragedGradients, where=lambda rank: False, parts=1):
    """(what the two processes left, what one process with the whole batch leaves)."""
    in_two_processes(_two, folder, strategy, where, parts)
    one = Turns(lambda rank: where(0) and where(1))
    fit(one, folder)
    return [torch.load(folder / f"{r}.pt") | json.loads((folder / f"{r}.json").read_text()) for r in (0, 1)], one


@pytest.mark.parametrize("parts", [1, 2])
def test_a_turn_sends_its_own_network_once(tmp_path, parts):
    """Equal to the last bit on both ranks, equal to one process to rounding; also where a share is done in parts."""
    two, one = run(tmp_path, parts=parts)
    assert two[0]["hash"] == two[1]["hash"]
    assert [rank["bytes"] for rank in two] == [4 * STEPS / 2 * (A + B)] * 2
    for rank in two:
        for key, value in one.state_dict().items():
            torch.testing.assert_close(rank["state"][key], value, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(rank["gradients"], one.gradients, strict=True):
            assert [g is None for g in ours] == [g is None for g in theirs]
            for gradient, other in zip(ours, theirs, strict=True):
                if other is not None:
                    torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
    assert one.gradients[-1][-1] is None  # what no loss reached has none, hence no step of Adam


def test_ddp_sends_all_networks_in_each_turn(tmp_path):
    two, one = run(tmp_path, lambda: CountedDDP(find_unused_parameters=True))
    assert two[0]["hash"] == two[1]["hash"]
    assert [rank["bytes"] for rank in two] == [4 * STEPS * (A + 2 * B)] * 2
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two[0]["state"][key], value, rtol=1e-5, atol=1e-6)


def test_what_one_rank_alone_reaches_is_averaged_with_zero(tmp_path):
    two, _ = run(tmp_path, where=lambda rank: rank == 1)
    assert two[0]["hash"] == two[1]["hash"]
    # In the first step, rank 1's half of the batch against the whole batch's size.
    begun = Turns()
    begun.extra((1.0 + torch.arange(64.0).view(8, 8).sin())[4:]).abs().sum().div(8).backward()
    for rank in two:
        torch.testing.assert_close(rank["gradients"][0][-1], begun.extra.bias.grad)
        torch.testing.assert_close(rank["gradients"][0][-2], begun.extra.weight.grad)


def _infinite(rank, folder):
    module = Turns()
    strategy = AveragedGradients()

    def losses(turn, x):
        loss = module.a(x).square().sum(1)
        return loss * float("inf") if rank == 1 else loss

    module.losses = losses
    fit(module, folder, strategy=strategy, devices=2)
    assert not module.gradients[0][0].isfinite().any()


def test_an_infinite_gradient_is_so_on_all_ranks(tmp_path):
    """So that a GradScaler skips the step on all of them."""
    in_two_processes(_infinite, tmp_path)


def test_buckets_hold_one_kind_of_number_and_about_their_size():
    parameters = [nn.Parameter(torch.zeros(n, dtype=kind)) for n, kind in ((3, torch.float32), (5, torch.float32))]
    parameters += [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(9))]
    assert [[len(p) for p in bucket] for bucket in buckets(parameters)] == [[3, 5], [2], [9]]
    assert [[len(p) for p in bucket] for bucket in buckets(parameters, size=12)] == [[3], [5], [2], [9]]
    assert list(buckets([])) == []
