"""Inductive moment matching: jumps between any two times, learned in groups by a kernel (IMM, Zhou et al., arXiv 2503.07565)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.components.consistency import check_middle, per_image
from lightning_modules.components.method import Method
from stillhouse.checks import check_above, check_counts
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.random_numbers import SharedMasks, TrainingStream, position_noise, position_uniforms
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.solvers import euler_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.second_time import condition_on_second_time

ETA_RANGE = 160.0  # of eta, from which the decrement is made: EDM's highest level over its sigma_data


class IMM(Method):
    """min_f E w(t) MMD^2(f_{s,t}(x_t), sg f_{s,r}(x_r)) at times s <= r < t, over groups of M images that share all three:

        MMD^2 = 1/M^2 sum_jk k(y_j, y_k) + k(y'_j, y'_k) - 2 k(y_j, y'_k),   y_j = f_{s,t}(x_t^j),   y'_j = sg f_{s,r}(x_r^j)

    The jump f_{s,t}(x) is DDIM's step from t to s by an estimate of x0 that is told both times. x_t and x_r have an image and its
    noise in common. With the time of a flow, x_t = (1 - t) x0 + t z and z ~ N(0, sigma_data^2), the noise level is
    sigma = sigma_data eta for eta = t / (1 - t). t is uniform in [t_min, t_max], s in [t_min, t], and

        eta(r) = max(eta(s), eta(t) - 160 / 2^k),   k(a, b) = exp(-max(|a - b|, 1e-8) / (D c_out(s, t))),
        w(t) = 1/2 sigmoid(b - lambda) (-dlambda/dt) (1 - t)^a / ((1 - t)^2 + t^2),   lambda = -2 ln(eta),

    where D counts an image's values and c_out(s, t) is what f multiplies the network's output by. Both passes have equal dropout
    masks, and sg is the student itself without a gradient.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        group_size: int = 4,
        k: float = 12.0,
        a: float = 1.0,
        b: float = 5.0,
        t_min: float = 0.006,
        t_max: float = 0.994,
        sigma_data: float = 0.5,
        middle: float | Sequence[float] = 0.7,
        **common,
    ):
        """Args beside those of `Method`.

        Args:
            teacher: Its network, with or without weights, is the student's beginning.
            group_size: M; 1: each image by itself.
            k: By which r follows t: eta goes back by 160 / 2^k.
            a: Power of 1 - t in the weight.
            b: Of the weight's sigmoid.
            t_min: The time of the images, at least 0.
            t_max: The time at which sampling starts, below 1.
            sigma_data: Standard deviation of the data, and of the noise.
            middle: The noise level between two jumps of a sample, or the levels between more of them, descending. Samples of
                other numbers of evaluations have times that are equally far apart.

        Raises:
            ValueError: For options out of range, or a network that takes no second time.
        """
        super().__init__(**common)
        check_counts(**{"method.group_size": group_size})
        if self.batch_size % group_size:
            raise ValueError(f"batch_size must be a multiple of method.group_size={group_size}, got {self.batch_size}")
        check_above(0, **{"method.sigma_data": sigma_data, "method.k": k})
        if not 0 <= t_min < t_max < 1:
            raise ValueError(f"need 0 <= method.t_min < method.t_max < 1, got {t_min!r} and {t_max!r}")
        self.sampler = teacher
        self.teacher = teacher if teacher.weights else None
        self.student = teacher.student(label_dropout=False).train()
        condition_on_second_time(self.student.network)
        self.group_size, self.k, self.a, self.b = group_size, k, a, b
        self.t_min, self.t_max, self.sigma_data = t_min, t_max, sigma_data
        self.middle = check_middle(middle, self.level(t_max), self.level(t_min))

    def frozen_networks(self) -> list[Teacher]:
        return []

    def learned_teachers(self) -> list[Teacher]:
        return []

    def end_teacher(self) -> None:
        """None: distributions are matched, and not the images of a noise."""

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": 1.0, "student without gradient": 1.0}

    # -- training --------------------------------------------------------------------------------------------------

    def level(self, t: Tensor | float) -> Tensor | float:
        """The noise level of times in [0, 1)."""
        return self.sigma_data * t / (1 - t)

    def times(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """s < t (G,), float64, of the groups that begin at places (G,) in the sequence of training samples."""
        first, second = position_uniforms(self.seed, position, TrainingStream.FLOW_TIMES, 2)
        t = self.t_min + (self.t_max - self.t_min) * first
        return self.t_min + (t - self.t_min) * second, t

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, position, labels = batch["image"].double(), batch["position"], batch.get("label")
        noise = position_noise(self.seed, position, images.shape[1:], TrainingStream.NORMALS).double()
        s_time, t_time = self.times(position[:: self.group_size])
        s, t = self.level(s_time), self.level(t_time)
        r = torch.maximum(s, t - self.sigma_data * ETA_RANGE / 2**self.k)
        masks = SharedMasks()
        with masks:
            y = self.jump(images, noise, t, s, labels)
        with masks, torch.no_grad():
            target = self.jump(images, noise, r, s, labels)
        # Of x = x0 + sigma e; in the flow's state, x_s = (1 - s) x, distances and c_out are both smaller by 1 - s.
        c_out = (1 - s / t) * self.student.preconditioning(t).out
        mmd = squared_mmd(y, target, c_out.abs())
        loss = (self.weight(t_time) * mmd).mean().float()
        self.log_mean("loss/student", loss.detach())
        self.log_mean("imm/mmd", mmd.detach().mean().float())
        return loss

    def jump(self, images: Tensor, noise: Tensor, start: Tensor, end: Tensor, labels: Tensor | None) -> Tensor:
        """f from images (B, C, H, W) with noise of levels `start` (G,) to those of `end` (G,), in groups: (G, M, C, H, W)."""
        start, end = (level.repeat_interleave(self.group_size) for level in (start, end))
        x = noised(images, start, noise)
        estimate = self.student(x, start, labels, until=end)
        return euler_step(x, estimate, per_image(start), per_image(end)).unflatten(0, (-1, self.group_size))

    def weight(self, t: Tensor) -> Tensor:
        """w(t), where -dlambda/dt is 2 / (t (1 - t))."""
        eta = t / (1 - t)
        return torch.sigmoid(self.b + 2 * eta.log()) / (t * (1 - t)) * (1 - t) ** self.a / ((1 - t) ** 2 + t**2)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        """Jumps from t_max to t_min (pushforward sampling)."""
        nfe = 1 if nfe is None else nfe
        check_counts(steps=nfe)
        between = self.middle
        if nfe != 1 + len(between):
            between = self.level(torch.linspace(self.t_max, self.t_min, nfe + 1, dtype=torch.float64))[1:-1].tolist()
        highest = self.level(self.t_max)
        scale = self.student.preconditioning.prior_std(torch.tensor(highest)).item()
        return Sampling([highest, *between, self.level(self.t_min)], scale, "jumps")


def squared_mmd(y: Tensor, target: Tensor, bandwidth: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of groups, by a Laplace kernel: all pairs are counted, a point with itself too.

    Args:
        y: (G, M, ...).
        target: (G, M, ...).
        bandwidth: (G,), over which and over the number of a point's values distances are divided.

    Returns:
        (G,).
    """
    y, target = y.flatten(2), target.flatten(2)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        square = (a[:, :, None] - b[:, None]).square().sum(-1)
        distance = square.clamp_min(1e-16).sqrt()  # without a gradient where two points are one
        return (-distance / (a.shape[-1] * bandwidth[:, None, None])).exp().mean((1, 2))

    return similarity(y, y) + similarity(target, target) - 2 * similarity(y, target)
