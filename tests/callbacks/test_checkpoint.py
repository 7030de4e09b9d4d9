"""A checkpoint is complete whenever the process dies; a resumed run is the uninterrupted one."""

import multiprocessing
import os
import resource
import signal
import time
import zipfile

import pytest
import pytorch_lightning as pl
import torch
from tiny_module import TinyMethod, identical, trainer

from callbacks.checkpoint import AtomicCheckpointIO, Checkpoints, read_checkpoint
from callbacks.ema import EMA
from callbacks.loggers.csv_logger import CSVLogger


def method():
    module = TinyMethod()
    module.monitor = "heldout/loss"
    return module


def fit(folder, steps, *callbacks, every=4, ckpt_path=None, validate_every=4, module=None):
    module = module or method()
    t = trainer(
        folder,
        steps,
        [EMA(), Checkpoints(every), *callbacks],
        validate_every=validate_every,
        logger=CSVLogger(folder, 4),
        plugins=[AtomicCheckpointIO()],
    )
    t.fit(module, ckpt_path=ckpt_path)
    return module


class Kill(pl.Callback):
    """Ends the run in the given hook at a step."""

    def __init__(self, hook, step):
        def end(trainer, *args):
            if trainer.global_step == step:
                raise KeyError("killed")

        setattr(self, hook, end)


def test_writes_last_and_best_and_nothing_else(tmp_path):
    module = fit(tmp_path, 10, every=4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    last = read_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert last["global_step"] == 10  # the end, though no multiple of 4
    assert torch.equal(last["state_dict"]["student.0.weight"], module.student[0].weight)


def test_best_is_the_lowest_value_and_nan_is_none(tmp_path):
    values = [float("nan"), 3.0, 1.0, 2.0, float("nan"), 1.0, 0.5, 4.0]

    class Script(TinyMethod):
        monitor = "heldout/loss"

        def validation_step(self, batch, batch_idx):
            self.log("heldout/loss", values[self.trainer.global_step - 1])

    steps = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            best = tmp_path / "checkpoints/best.ckpt"
            steps.append(read_checkpoint(best)["global_step"] if best.exists() else None)

    trainer(tmp_path, 8, [Look(), Checkpoints(100)], validate_every=1).fit(Script())
    assert steps == [None, None, 2, 3, 3, 3, 3, 7]


def test_a_monitor_that_is_not_logged(tmp_path):
    module = method()
    module.monitor = "fid"
    with pytest.raises(ValueError, match=r"'fid' was not logged in validation; there is \[.*'heldout/loss'"):
        fit(tmp_path, 4, module=module)


# With 12 steps and a validation every 4: last.ckpt is written every `every` steps, and before each validation.
@pytest.mark.parametrize(
    ("every", "hook", "step", "saved"),
    [
        (4, "on_train_batch_start", 6, 4),
        (3, "on_train_batch_start", 7, 6),
        (4, "on_validation_start", 8, 8),
        (100, "on_validation_batch_start", 8, 8),
        (3, "on_validation_end", 4, 4),
        (3, "on_validation_epoch_end", 12, 12),  # of the last step, which is resumed for that alone
        (5, "on_train_end", 12, 12),
    ],
)
def test_interrupted_is_uninterrupted(tmp_path, every, hook, step, saved):
    fit(tmp_path / "whole", 12, every=every)
    with pytest.raises(KeyError):
        fit(tmp_path / "cut", 12, Kill(hook, step), every=every)
    # save_on_exception is not wanted: an exception may come between the parts of a step
    assert read_checkpoint(tmp_path / "cut/checkpoints/last.ckpt")["global_step"] == saved
    module = fit(tmp_path / "cut", 12, every=every, ckpt_path=tmp_path / "cut/checkpoints/last.ckpt")
    assert module.seen == list(range(saved, 12))  # the data go on where they were
    for name in ("last", "best"):
        one, two = (read_checkpoint(tmp_path / run / f"checkpoints/{name}.ckpt") for run in ("whole", "cut"))
        assert identical(one, two)
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "cut/metrics.csv").read_bytes()


def test_killed_once_the_checkpoint_is_there(tmp_path, monkeypatch):
    """What was logged of its step is on disk before it: no later run logs that again."""
    for step in (3, 4):
        fit(tmp_path / "whole", 12, every=3)
        save = AtomicCheckpointIO.save_checkpoint

        def killed(self, checkpoint, path, storage_options=None, save=save, step=step):
            save(self, checkpoint, path)
            if checkpoint["global_step"] == step:
                raise KeyError("killed")

        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
            fit(tmp_path / "cut", 12, every=3)
        fit(tmp_path / "cut", 12, every=3, ckpt_path=tmp_path / "cut/checkpoints/last.ckpt")
        assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "cut/metrics.csv").read_bytes()


def test_a_finished_run_can_be_prolonged(tmp_path):
    fit(tmp_path / "whole", 14)
    fit(tmp_path / "two", 10)
    module = fit(tmp_path / "two", 14, ckpt_path=tmp_path / "two/checkpoints/last.ckpt")
    assert module.seen == list(range(10, 14))
    one, two = (read_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in ("whole", "two"))
    assert identical(one, two)
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "two/metrics.csv").read_bytes()


def _save_for_ever(path, started):
    number = 0
    while True:
        weight = torch.full((1 << 17,), float(number))
        AtomicCheckpointIO().save_checkpoint({"number": number, "state_dict": {"weight": weight}}, path)
        number += 1
        started.set()


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoints/last.ckpt"
    context = multiprocessing.get_context("fork")
    delays = torch.rand(12, generator=torch.Generator().manual_seed(0)).mul(0.03).tolist()
    left_over = 0
    for delay in delays:
        started = context.Event()
        process = context.Process(target=_save_for_ever, args=(path, started))
        process.start()
        assert started.wait(20)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        checkpoint = read_checkpoint(path)
        assert checkpoint["state_dict"]["weight"].eq(checkpoint["number"]).all()
        left_over += any(".tmp-" in one.name for one in path.parent.iterdir())
        assert len(list(path.parent.iterdir())) <= 2  # what is left over does not pile up
    assert left_over  # kills did fall into the writing


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    fit(tmp_path, 4)
    path = tmp_path / "checkpoints/last.ckpt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    at = whole.index(torch.load(path)["state_dict"]["student.0.weight"].numpy().tobytes())
    flipped[at + 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"last.ckpt is damaged or cut short.*or remove last.ckpt to start"
        ) as info:
            fit(tmp_path, 8, ckpt_path=path)
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)
        assert path.read_bytes() == damaged
    assert torch.load(path)  # torch alone does not notice the flipped bit


def test_foreign_objects_other_zips_and_missing_files(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"module": torch.nn.Linear(1, 1), "state_dict": {}}, path)
    with pytest.raises(
        ValueError, match=r"x.ckpt holds objects other than tensors.*: put an older copy back, or remove"
    ):
        read_checkpoint(path)
    assert "module" in read_checkpoint(path, weights_only=False)
    for content in ([1], {"weights": {}}, {"state_dict": [torch.ones(1)]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"x.ckpt has no state_dict: put an older copy back"):
            read_checkpoint(path)
    torch.save({"state_dict": {}, "global_step": 3}, path)
    with pytest.raises(ValueError, match=r"x.ckpt can't be resumed, it lacks callbacks, loops, optimizer_states: put"):
        AtomicCheckpointIO().load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no checkpoint")
    with pytest.raises(ValueError, match=r"x.ckpt cannot be read \(.*\): put an older copy back") as info:
        read_checkpoint(path)
    assert "\n" not in str(info.value)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*y.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "y.ckpt")


def test_a_checkpoint_says_whose_it_is_and_is_refused_elsewhere(tmp_path):
    path = tmp_path / "last.ckpt"
    whole = {key: {} for key in ("callbacks", "loops", "state_dict")} | {"global_step": 3, "optimizer_states": []}
    ours = {"method": "disback", "config": "aa"}
    AtomicCheckpointIO(ours).save_checkpoint(whole, path)
    assert AtomicCheckpointIO(ours).load_checkpoint(path) == whole | {"run": ours}
    for other, reason in (
        ({"method": "sfd", "config": "bb"}, r"last.ckpt is of another method \(disback, and this run's is sfd\): put"),
        (
            {"method": "disback", "config": "bb"},
            r"is of another configuration \(aa, and this run's is bb\): put the run's",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            AtomicCheckpointIO(other).load_checkpoint(path)
    AtomicCheckpointIO().save_checkpoint(whole, path)  # as before checkpoints said so
    assert AtomicCheckpointIO(ours).load_checkpoint(path) == whole


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = {"state_dict": {"weight": torch.zeros(1 << 18)}}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
        with pytest.raises(OSError, match=r"last.ckpt: File too large; there is no earlier one. Make room"):
            AtomicCheckpointIO().save_checkpoint(big, path)
        assert list(tmp_path.iterdir()) == []
        AtomicCheckpointIO().save_checkpoint({"number": 1, "state_dict": {}}, path)
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*last.ckpt: .*; the previous one is intact"):
            AtomicCheckpointIO().save_checkpoint(big, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert list(tmp_path.iterdir()) == [path]
    assert read_checkpoint(path)["number"] == 1


def test_an_unpicklable_checkpoint_keeps_the_previous_one(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"number": 1, "state_dict": {}}, path)
    with pytest.raises(Exception, match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"number": lambda: 2}, path)
    assert read_checkpoint(path)["number"] == 1


def test_misuse():
    with pytest.raises(ValueError, match="Checkpoints: every_n_steps must be at least 1, got 0"):
        Checkpoints(0)
