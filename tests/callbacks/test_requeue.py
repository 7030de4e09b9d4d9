"""A signal ends all ranks at one step, also one that comes while they ask each other."""

import signal
from types import SimpleNamespace

import pytest

from callbacks import requeue
from launch.signals import Notice, Stopped


def ranks(monkeypatch, answers):
    """A trainer of one of two ranks, whose k-th exchange answers answers[k](what this rank says)."""
    monkeypatch.setattr(requeue, "NOTICE", notice := Notice())
    exchanges = iter(answers)
    strategy = SimpleNamespace(on_any_rank=lambda flags: next(exchanges)(flags))
    return SimpleNamespace(world_size=2, global_step=10, strategy=strategy, callbacks=[]), notice


def test_a_signal_that_comes_in_the_exchange_is_seen_in_the_next_one(monkeypatch):
    def late(flags):
        notice.given = signal.SIGUSR1  # by the handler, while this rank waits for the others
        return flags

    trainer, notice = ranks(monkeypatch, [late, lambda flags: flags])
    callback = requeue.Requeue()
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert notice.given == signal.SIGUSR1
    callback.on_train_batch_start(trainer, None, None, 0)  # goes on as the other rank, which does not know
    callback.on_train_batch_end(trainer, None, None, None, 0)
    with pytest.raises(Stopped, match="after step 10"):
        callback.on_train_batch_start(trainer, None, None, 0)


def test_the_signal_of_another_rank_is_this_ones_too(monkeypatch):
    trainer, notice = ranks(monkeypatch, [lambda flags: [number == signal.SIGTERM for number in requeue.SIGNALS]])
    callback = requeue.Requeue()
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert notice.given == signal.SIGTERM
    with pytest.raises(Stopped):
        callback.on_train_batch_start(trainer, None, None, 0)


def test_misuse():
    with pytest.raises(ValueError, match="Requeue: every_n_steps must be at least 1, got 0"):
        requeue.Requeue(0)
