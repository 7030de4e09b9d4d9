"""trainer.micro_batch=auto finds what fits without a trace in the run, alone and with other processes."""

import re

import pytest
import torch
import torch.distributed as dist
from method_runs import BATCH, train
from process_tools import in_two_processes
from tiny_module import identical

from launch.errors import expected, one_line, out_of_memory
from lightning_modules.components.optimisation import Optimisation

AUTO = {"trainer.micro_batch": "auto"}
CASES = {
    "noisy targets": ("denoising_student", {"method.target_noise": 0.1}),
    "of random levels": ("pretrain", {}),
    "several updates in a step": ("sfd", {}),
    "two turns": ("diff_instruct", {"method.clip": 1.0}),
}
QUICK = ("several updates in a step", "two turns")


@pytest.fixture
def room(monkeypatch):
    """Makes passes of more than so many images fail as on a full device; counts the failures."""
    original, failures = Optimisation.micro_batches, []

    def limit(images, error=torch.OutOfMemoryError):
        def parts(self, batch):
            for part in original(self, batch):
                if len(next(iter(part.values()))) > images:
                    failures.append(len(next(iter(part.values()))))
                    raise error("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
                yield part

        monkeypatch.setattr(Optimisation, "micro_batches", parts)
        return failures

    return limit


def assert_same(ours, theirs):
    assert identical(ours.method.state_dict(), theirs.method.state_dict())
    assert identical(ours.gradients, theirs.gradients)
    assert ours.logged == theirs.logged
    assert ours.trainer.global_step == theirs.trainer.global_step


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_the_run_is_that_of_the_size_it_finds_bit_for_bit(case, tmp_path, monkeypatch, room, capsys):
    monkeypatch.chdir(tmp_path)
    name, changes = CASES[case]
    given = train(name, changes | {"trainer.micro_batch": 2})
    failures = room(2)
    found = train(name, changes | AUTO)
    assert failures == [BATCH, 3]
    assert found.method.micro_batch == 2
    assert_same(found, given)
    assert "trainer.micro_batch=auto: 2 images of the 5 on each device in a pass, 3 a step\n" in capsys.readouterr().err


def test_where_all_fits_it_is_as_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_same(train("sfd", AUTO), train("sfd"))


def test_what_a_checkpoint_remembers_is_tried_first(tmp_path, monkeypatch, room):
    """So that a resumed run repeats the sums of an uninterrupted one."""
    monkeypatch.chdir(tmp_path)
    room(2)
    first = train("pretrain", AUTO)
    state = {c.state_key: c.state_dict() for c in first.trainer.callbacks}["FindMicroBatch"]
    assert state == {"micro_batch": 2}
    first.trainer.save_checkpoint("first.ckpt")
    stored = torch.load("first.ckpt")
    del stored["run"]  # which has another length
    torch.save(stored, "first.ckpt")
    failures = room(2)
    failures.clear()
    train("pretrain", AUTO | {"method.kimg": 0.015}, resume="first.ckpt")
    assert failures == []


def test_a_single_image_that_does_not_fit_ends_the_run(tmp_path, monkeypatch, room):
    monkeypatch.chdir(tmp_path)
    failures = room(0)
    with pytest.raises(
        ValueError, match=r"micro_batch=auto: the memory does not hold the passes of a single image; take"
    ):
        train("pretrain", AUTO)
    assert failures == [5, 2, 1, 1]  # in the first part of one, two, three and five


@pytest.mark.slow
def test_groups_that_a_loss_compares_stay_whole(tmp_path, monkeypatch, room, capsys):
    monkeypatch.chdir(tmp_path)
    failures = room(2)
    train("imm", AUTO)  # of pairs
    assert failures == [6, 4]
    assert "auto: 2 images of the 6 on each device in a pass, 3 a step\n" in capsys.readouterr().err
    room(1)
    with pytest.raises(
        ValueError, match="memory does not hold the passes of a group of 2 images; take a smaller network"
    ):
        train("imm", AUTO)


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch, room):
    monkeypatch.chdir(tmp_path)

    def other(text):
        return RuntimeError("shapes differ")

    room(2, other)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train("pretrain", AUTO)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Of"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_without_it_the_message_names_the_option(error):
    assert out_of_memory(error)
    assert expected(error)
    assert re.search(r"^out of memory .*: lower trainer\.micro_batch, or set it to auto", one_line(error))
    assert "\n" not in one_line(error)


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def _two(rank, folder):
    import os

    os.chdir(folder)
    two = {"trainer.devices": 2, "batch_size": 10}
    whole = train("diff_instruct", two)
    weighted = {"method.divergence": "js"}  # by a mean over the processes
    train("dmd2", two | weighted)
    if rank == 1:  # which has less memory than the other
        original = Optimisation.micro_batches

        def parts(self, batch):
            for part in original(self, batch):
                if len(next(iter(part.values()))) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield part

        Optimisation.micro_batches = parts
    assert train("dmd2", two | weighted | AUTO).method.micro_batch == 2
    found = train("diff_instruct", two | AUTO)
    assert found.method.micro_batch == 2
    for a, b in zip(found.gradients, whole.gradients, strict=True):
        size = max(float(g.abs().max()) for g in b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-4 * size)
    mine = torch.cat([g.flatten() for step in found.gradients for g in step])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_two_processes_agree_and_share_their_gradients(tmp_path):
    in_two_processes(_two, tmp_path)
