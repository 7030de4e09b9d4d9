"""Bezier distillation: paths bent through what several teachers make of one noise (after Feng & Yang, arXiv 2503.16562).

The note has no formulas or experiments in public. This is a general definition: order n = 1 with one teacher is rectified flow's
reflow (the drift fit) and distillation (the prediction of the end), to the last bit.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.components.flow_student import PairedFlow
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion import bezier
from stillhouse.diffusion.control_points import (
    END_ROWS,
    ControlPoints,
    Matrix,
    check_slots,
    check_weights,
    default_weights,
)
from stillhouse.diffusion.distance import Distance
from stillhouse.diffusion.flow import level_of
from stillhouse.diffusion.losses import regression
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise, sample_uniforms
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.time_distributions import TimeDistribution
from stillhouse.networks.branching import plain_state, widen


class BezierDistillation(PairedFlow):
    """min E [ prediction * d(f(B_t, t), P_n) + drift * |B'_t - v(B_t, t)|^2 / 2 ] over curves B_t from noise P_0 to images P_n.

    f(x, t) = x + (1 - t) u(x, t) predicts the end of the curve; a sample is f(x_0, 0), one evaluation. v fits its drift: its ODE
    carries noise to the distribution of P_n, by the argument of rectified flow. With prediction = 0 the student is that flow,
    sampled as its last teacher is. Where both are trained the network has two outputs, v and u, or with `shared` one, which is
    right for straight curves alone.

    Args:
        teachers: They see the same noise; the student begins as the last one.
        order: Of the curves; 1 is straight.
        slot: What the inner control points are taken from, one name or one for each of them (`diffusion.control_points`).
        weights: Rows of A, the teachers' weights in each control point; None: `default_weights`.
        final_weights: Where the weights have moved to at the end of training, linearly; None: they stay.
        end_row: How several teachers share the end of a curve, one of END_ROWS.
        shuffled: Whether inner control points are those of other samples, as a control experiment.
        prediction: Weight of the predicted end.
        prediction_times: Distribution of its t.
        drift: Weight of the drift fit.
        drift_times: Distribution of its t.
        shared: With both, one output for both.
        loss: d, with `lpips_weights` and `lpips_resize` as of `diffusion.distance.Distance`.
        options: Of `PairedFlow`.

    Raises:
        ValueError: For options out of range or that exclude each other.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        order: int,
        slot: str | Sequence[str],
        weights: Matrix | None,
        final_weights: Matrix | None,
        end_row: str,
        shuffled: bool,
        prediction: float,
        prediction_times: TimeDistribution,
        drift: float,
        drift_times: TimeDistribution,
        shared: bool,
        loss: str = "l2",
        lpips_weights: str | None = None,
        lpips_resize: int | None = None,
        **options,
    ):
        check_counts(**{"method.order": order})
        check_choice("method.end_row", end_row, END_ROWS)
        super().__init__(teachers, **options)
        for name, weight in (("prediction", prediction), ("drift", drift)):
            if weight < 0:
                raise ValueError(f"method.{name} must not be negative, got {weight!r}")
        if not prediction + drift:
            raise ValueError("method.prediction and method.drift are both zero; give one of them weight")
        count = len(self.teachers)
        weights = default_weights(order, count) if weights is None else weights
        first = check_weights("weights", weights, order, count)
        last = first if final_weights is None else check_weights("final_weights", final_weights, order, count)
        self.register_buffer("first_weights", first, persistent=False)
        self.register_buffer("last_weights", last, persistent=False)
        self.control_points = ControlPoints(order, check_slots(slot, order), end_row, shuffled)
        self.weight_of_prediction, self.prediction_times = prediction, prediction_times
        self.weight_of_drift, self.drift_times = drift, drift_times
        self.distance = Distance(loss, self.image_shape, lpips_weights, lpips_resize)
        if prediction:
            self.euler_steps = 1  # from a point on a bent curve it learns the way to its end, not to the next point
        if prediction and drift and not shared:
            widen(self.student.network, 2)

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": float(bool(self.weight_of_prediction) + bool(self.weight_of_drift))}

    @property
    def through(self) -> Iterable[float]:
        return [level_of(t) for t in self.control_points.times]

    def exported(self) -> dict[str, Tensor]:
        """The network of u, or where that is not trained of v."""
        return plain_state(self.student.network)

    def frozen_networks(self) -> list[Any]:
        return [*super().frozen_networks(), self.distance]

    def learned_teachers(self) -> list[Teacher]:
        return list(self.teachers)

    def end_teacher(self) -> Teacher | None:
        used = self.last_weights[-1].nonzero().flatten().tolist()
        return self.teachers[used[0]] if len(used) == 1 else None

    def training_curves(self, seeds: Tensor) -> tuple[str, Tensor]:
        noise, labels = sample_noise(seeds, self.image_shape), sample_labels(seeds, self.teacher.num_classes)
        states = torch.stack([self._states(teacher, noise, labels) for teacher in self.teachers], dim=1)
        control_points, weights = self.control_points.to(seeds.device), self.last_weights.to(seeds.device)
        names = ", ".join(teacher.name for teacher in self.teachers)
        slots = "".join(f", {slot}" for slot in dict.fromkeys(self.control_points.slots))
        title = f"Bezier, order {self.control_points.order}{slots}: training curves\n({names})"
        return title, control_points(noise.double(), states, weights, sample_uniforms(seeds))

    def _states(self, teacher: Teacher, noise: Tensor, labels: Tensor | None) -> Tensor:
        """x = X_t / t of a teacher's path at the times of the control points, then its end: (N, K, C, H, W), float64."""
        teacher.to(noise.device)
        levels = tuple(self.through)
        reached = teacher.sigmas(None, levels).tolist()[1:]
        states = dict(zip(reached, teacher.trajectory(noise, labels, through=levels), strict=True))
        return torch.stack([states[level] for level in (*levels, 0.0)], 1)

    def control_points_of(self, batch: dict[str, Tensor]) -> Tensor:
        """P_0 .. P_n, (B, n + 1, C, H, W)."""
        weights = self.first_weights + self.progress * (self.last_weights - self.first_weights)
        states = batch["states"].unflatten(1, (len(self.teachers), -1))
        return self.control_points(batch["noise"], states, weights, sample_uniforms(batch["seed"]))

    def drift_loss(self, control: Tensor, batch: dict[str, Tensor]) -> Tensor:
        t = self.time(self.drift_times, batch)
        drift = self.drift(bezier.point(control, t), t, batch.get("label"))
        return regression(drift, bezier.derivative(control, t), "l2")

    def prediction_loss(self, control: Tensor, batch: dict[str, Tensor]) -> Tensor:
        t = self.time(self.prediction_times, batch, draw=1)
        return self.distance(self.predict(bezier.point(control, t), t, batch.get("label")), control[:, -1])

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        # Of the whole batch, in which inner control points may be shuffled.
        return {**batch, "control": self.control_points_of(batch)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        control = batch["control"]
        loss = torch.zeros((), device=control.device)
        if self.weight_of_prediction:
            prediction = self.prediction_loss(control, batch).mean()
            self.log_mean("loss/prediction", prediction.detach())
            loss = loss + self.weight_of_prediction * prediction
        if self.weight_of_drift:
            drift = self.drift_loss(control, batch).mean()
            self.log_mean("loss/drift", drift.detach())
            loss = loss + self.weight_of_drift * drift
        self.log_mean("loss/student", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        control = self.control_points_of(batch)
        if self.weight_of_prediction:
            losses = self.distance(self.sample(batch["noise"], batch.get("label")), control[:, -1])
        else:
            losses = self.drift_loss(control, batch)
        self.log_held_out(losses)
