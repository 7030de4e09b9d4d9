"""NaN stops the run, says what to do, and never reaches a checkpoint."""

import pytest
import pytorch_lightning as pl
import torch
from method_runs import train
from process_tools import in_two_processes
from pytorch_lightning.plugins import MixedPrecision
from tiny_module import TWO, TinyMethod, trainer

from callbacks.checkpoint import Checkpoints, read_checkpoint
from callbacks.non_finite import NonFiniteError, NonFiniteGuard


def fit(folder, steps, *callbacks, bad_step=-1, module=None):
    trainer(folder, steps, callbacks).fit(module or TinyMethod(bad_step=bad_step))


def test_nan_is_seen_at_the_next_look(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"loss became NaN within steps 6 to 10.*No checkpoint.*lower method.lr"
    ):
        fit(tmp_path, 20, NonFiniteGuard(5), bad_step=7)


def test_nan_never_reaches_a_checkpoint(tmp_path):
    # Checkpoints is listed first: Lightning moves it behind the guard, and the guard looks before the file is written.
    last = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(NonFiniteError, match=rf"within steps 5 to 8. The last good checkpoint is {last}. Try") as info:
        fit(tmp_path, 20, Checkpoints(4), NonFiniteGuard(100), bad_step=6)
    assert "\n" not in str(info.value)
    checkpoint = read_checkpoint(last)
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())
    assert list(last.parent.iterdir()) == [last]


def test_infinite_loss_and_cancelling_infinities(tmp_path):
    class Infinite(TinyMethod):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + {2: float("inf"), 3: float("-inf")}.get(self.trainer.global_step, 0.0)

    with pytest.raises(NonFiniteError, match="within steps 1 to 5"):
        fit(tmp_path, 20, NonFiniteGuard(5), module=Infinite())


def test_ruined_weights_behind_a_finite_loss(tmp_path):
    class Overflow(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 7:
                pl_module.student[0].weight.grad[0, 0, 0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"student.0.weight is not finite after step 8. The last good checkpoint"):
        fit(tmp_path, 20, Overflow(), NonFiniteGuard(100), Checkpoints(4))
    assert read_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 4


def test_a_good_run_is_left_alone_and_not_synchronised(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(NonFiniteGuard, "_check", lambda self, trainer: looks.append(trainer.global_step))
    fit(tmp_path / "a", 9, NonFiniteGuard(4))
    assert looks == [4, 8]
    monkeypatch.undo()

    class Large(TinyMethod):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 2e38

    fit(tmp_path / "large", 4, NonFiniteGuard(1), module=Large())  # the sum is over the steps since the last look
    fit(tmp_path / "b", 9, NonFiniteGuard(4), Checkpoints(3))
    assert read_checkpoint(tmp_path / "b/checkpoints/last.ckpt")["global_step"] == 9


# -- gradients replaced -----------------------------------------------------------------------------------------------


class Spoil(pl.Callback):
    """Puts what is not finite into the first two weights' gradients of one step; keeps what is there after the guard."""

    def __init__(self, step):
        self.step, self.seen = step, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            first, second = (p.grad for p in optimizer.param_groups[0]["params"][:2])
            first.flatten()[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
            second.fill_(float("nan"))


def test_replaced_gradients_are_counted_and_training_goes_on_through_a_resume(tmp_path):
    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                first, second = (p.grad for p in optimizer.param_groups[0]["params"][:2])
                assert first.flatten()[:3].tolist() == [0.0, 1e5, -1e5]
                assert not second.any()
                assert first.flatten()[3:].any()

    last = tmp_path / "checkpoints/last.ckpt"
    for steps in (4, 8):
        spoiled = [Spoil(2), Spoil(5)]
        guard = NonFiniteGuard(1, gradients="replace")
        made = trainer(tmp_path, steps, [*spoiled, guard, Look(), Checkpoints(4)])
        made.fit(TinyMethod(bad_step=6), ckpt_path=last if last.exists() else None)
        weights = 9 + 1 + 1 + 1  # of step 6, whose loss is NaN
        assert made.callback_metrics["gradient/replaced"] == {4: 4, 8: 8 + weights}[steps]
    assert all(torch.isfinite(v).all() for v in read_checkpoint(last)["state_dict"].values())


@pytest.mark.parametrize("changes", [{}, {"method.two_sided": True}], ids=["in turn", "both"])
def test_each_networks_gradients_are_replaced_before_their_norm_is_limited(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    replace = NonFiniteGuard.on_before_optimizer_step

    def spoil_and_replace(self, trainer, pl_module, optimizer):
        gradient = next(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        gradient[(0,) * gradient.ndim] = float("inf")
        replace(self, trainer, pl_module, optimizer)

    monkeypatch.setattr(NonFiniteGuard, "on_before_optimizer_step", spoil_and_replace)
    guard = {"_target_": "callbacks.NonFiniteGuard", "every_n_steps": 1, "gradients": "replace"}
    run = train("diff_instruct", {"callbacks.guard": guard, "method.clip": 1.0} | changes)
    assert run.trainer.callback_metrics["gradient/replaced"] == 2 * (2 if changes else 1)
    assert all(p.isfinite().all() for p in run.method.parameters())
    limited = [max(g.abs().max() for g in gradients) for gradients in run.gradients]
    assert limited == [1e5] * len(limited)  # seen by a callback, whose turn is before the method's


def test_replacing_is_refused_under_a_loss_scale(tmp_path):
    with pytest.raises(
        ValueError, match="gradients=replace does not go with trainer.precision=16-mixed, whose loss scale"
    ):
        fit_scaled(tmp_path, 2, TinyMethod(), NonFiniteGuard(1, gradients="replace"))
    with pytest.raises(ValueError, match="callbacks.guard.gradients must be one of stop, replace, got 'skip'"):
        NonFiniteGuard(gradients="skip")


# -- under a loss scale -----------------------------------------------------------------------------------------------


class Overflowing(TinyMethod):
    """Multiplies the loss of the steps `bad` by infinity; of two processes on the rank `where` alone."""

    def __init__(self, bad, where=0):
        super().__init__()
        self.bad, self.where = set(bad), where

    def training_step(self, batch, batch_idx):
        bad = self.trainer.global_step in self.bad and self.global_rank == self.where
        return super().training_step(batch, batch_idx) * (float("inf") if bad else 1.0)


def fit_scaled(folder, steps, module, *callbacks, **options):
    """In bfloat16, which a CPU has, with the loss scale of 16-mixed on a GPU."""
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu")
    made = trainer(folder, steps, callbacks, plugins=[plugin], **options)
    last = folder / "checkpoints/last.ckpt"
    made.fit(module, ckpt_path=last if last.exists() else None)
    return made


def test_a_step_that_the_loss_scale_skips_is_counted_and_training_goes_on(tmp_path):
    for steps, skipped in ((6, 1), (9, 3)):  # the second time resumed from step 6
        made = fit_scaled(tmp_path, steps, Overflowing({2, 6, 7}), NonFiniteGuard(2), Checkpoints(3))
        assert made.global_step == steps
        assert made.callback_metrics["loss_scale/skipped_steps"] == skipped
        assert made.callback_metrics["loss_scale/scale"] == 2.0 ** (16 - skipped)
    state = read_checkpoint(tmp_path / "checkpoints/last.ckpt")["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_steps_that_overflow_without_end_stop_the_run(tmp_path):
    with pytest.raises(
        NonFiniteError,
        match=r"overflow in every step: by step 40 the loss scale of 16-mixed has fallen to 6e-08, and 40 steps were "
        r"skipped. No checkpoint had been written yet. Try a lower method.lr or trainer.precision=32-true or bf16-mixed",
    ):
        fit_scaled(tmp_path, 60, Overflowing(range(60)), NonFiniteGuard(40))


def test_an_infinite_loss_that_the_scale_does_not_skip_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="the loss became NaN within steps 1 to 5"):
        fit_scaled(tmp_path, 9, NotInTheGradient(), NonFiniteGuard(5))


class NotInTheGradient(TinyMethod):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + float("nan") if self.trainer.global_step == 3 else loss


def _skip_on_both(rank, folder):
    made = fit_scaled(folder, 6, Overflowing({2}, where=1), NonFiniteGuard(2), Checkpoints(3), **TWO)
    assert made.callback_metrics["loss_scale/skipped_steps"] == 1
    assert made.global_step == 6


def test_a_step_that_overflows_on_one_process_is_skipped_on_all(tmp_path):
    in_two_processes(_skip_on_both, tmp_path)


def _diverge_rank(rank, folder):
    class OneRank(TinyMethod):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            # NaN in rank one's value alone, not in the gradients: rank zero, which writes, has nothing to see
            return loss + float("nan") if self.global_rank == 1 and self.trainer.global_step == 6 else loss

    with pytest.raises(NonFiniteError, match="loss became NaN within steps 5 to 8"):
        trainer(folder, 20, [NonFiniteGuard(100), Checkpoints(4)], **TWO).fit(OneRank())


def test_the_writing_process_hears_of_the_other(tmp_path):
    in_two_processes(_diverge_rank, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 4


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match="NonFiniteGuard: every_n_steps must be at least 1, got 0"):
        NonFiniteGuard(0)

    class Silent(TinyMethod):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().step()

    with pytest.raises(ValueError, match=r"Silent.training_step must return its loss"):
        fit(tmp_path, 2, NonFiniteGuard(), module=Silent())
