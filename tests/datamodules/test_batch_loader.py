import logging
import warnings
from contextlib import contextmanager
from itertools import islice

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from datamodules.components.batch_loader import copied_ahead
from datamodules.digits import Digits

STEPS = 18


class Tiny(pl.LightningModule):
    """One optimiser step per batch, noise from the step number alone; remembers the data it saw."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)
        self.fail_at = fail_at
        self.seen: list[bytes] = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.layer.parameters(), 1e-2)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("stopped by the test")
        self.seen.append(batch["image"].numpy().tobytes())
        torch.manual_seed(self.global_step)
        x = batch["image"].flatten(1)
        loss = torch.nn.functional.cross_entropy(self.layer(x + 0.1 * torch.randn_like(x)), batch["label"])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def train(root, module, steps=STEPS, callbacks=(), ckpt_path=None, batch_size=128, **options):
    # 18 batches of 128 reach into the second epoch of the digits.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = {"callbacks": list(callbacks)} if callbacks else {"enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", **quiet, **saves, **options)
    data = Digits(root=str(root), batch_size=batch_size, seed=4, flip=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=".*callbacks used to create the checkpoint|.*Checkpoint directory|.*pre-optimization|.*dirpath has changed",
        )
        warnings.filterwarnings("error", message="You're resuming|.*does not have many workers")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def checkpoints(folder, **options):
    return ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=-1, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def uninterrupted(root):
    return train(root, Tiny())


@pytest.mark.parametrize("epoch", [{}, {"limit_train_batches": 5}], ids=["one endless epoch", "epochs of 5 batches"])
@pytest.mark.parametrize("stop", [5, 7, 10])
def test_resume_continues_with_the_next_batch_bit_for_bit(root, tmp_path, uninterrupted, epoch, stop):
    save = checkpoints(tmp_path, every_n_train_steps=stop)
    first = train(root, Tiny(), stop, [save], **epoch)
    second = train(root, Tiny(), STEPS, [save], tmp_path / "last.ckpt", **epoch)
    assert len(first.seen) == stop
    assert first.seen + second.seen == uninterrupted.seen
    assert torch.equal(second.layer.weight, uninterrupted.layer.weight)


def test_epochs_do_not_rewind_the_order(root, uninterrupted):
    assert train(root, Tiny(), limit_train_batches=4).seen == uninterrupted.seen
    assert len(set(uninterrupted.seen)) == STEPS


def test_a_batch_that_an_exception_interrupted_is_not_skipped(root, tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(root, Tiny(fail_at=9), callbacks=[checkpoints(tmp_path, every_n_train_steps=4, save_on_exception=True)])
    counters = torch.load(tmp_path / "last.ckpt")["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert (counters["ready"], counters["processed"]) == (10, 9)  # Lightning's own count: `ready` would skip one
    resumed = train(root, Tiny(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == uninterrupted.seen[9:]
    assert torch.equal(resumed.layer.weight, uninterrupted.layer.weight)


class Recorder(Tiny):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save(self.seen, self.folder / f"rank{self.global_rank}.pt")


@pytest.mark.parametrize("distributed_sampler", [True, False])
def test_two_ranks_side_by_side_see_the_batch_of_one(root, tmp_path, uninterrupted, distributed_sampler):
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": distributed_sampler}
    train(root, Recorder(tmp_path), 5, **options)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == uninterrupted.seen[:5]


def test_a_batch_that_does_not_divide_is_refused(root):
    with pytest.raises(Exception, match=r"batch_size=127 \(global\) cannot be divided evenly over 2 devices"):
        train(root, Tiny(), 2, batch_size=127, devices=2, strategy="ddp_fork")


def test_a_batch_is_given_out_while_the_next_is_copied_by_another_stream(monkeypatch):
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return log[-1].split()[1]

        def wait_event(self, batch):
            log.append(f"{self.name} waits for {batch}")

    class Values:
        def __init__(self, batch):
            self.batch = batch

        def to(self, device, non_blocking):
            assert active[-1] == "copies"
            assert non_blocking
            log.append(f"copied {self.batch}")
            return self

        def record_stream(self, stream):
            log.append(f"{self.batch} kept for {stream.name}")

    active = ["main"]

    @contextmanager
    def entered(stream):
        active.append(stream.name)
        yield
        active.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    for batch in copied_ahead([{"image": Values(i)} for i in range(3)], torch.device("cuda")):
        log.append(f"used {batch['image'].batch}")
    assert [line for line in log if "kept" not in line] == [
        *("copied 0", "copied 1", "main waits for 0", "used 0"),
        *("copied 2", "main waits for 1", "used 1"),
        *("main waits for 2", "used 2"),
    ]
    assert [line for line in log if "kept" in line] == [f"{i} kept for main" for i in range(3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu(root):
    data = Digits(root=str(root), batch_size=128, seed=4)
    batches = [data.train_dataloader() for _ in range(2)]
    batches[1].device = torch.device("cuda")
    for here, there in islice(zip(*batches, strict=True), 5):
        assert there["image"].is_cuda
        assert {k: v.cpu().tolist() for k, v in there.items()} == {k: v.tolist() for k, v in here.items()}
