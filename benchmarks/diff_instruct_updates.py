"""The two updates of DMD2 by `diff_instruct`, in the trainer as train.py builds it: of the fake score, and of the generator."""

from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl

from benchmarks.cases import Case, compose_config, prepare
from benchmarks.floor import latest_update
from benchmarks.methods import CIFAR10, synthetic
from benchmarks.turns import Turns, update_options
from launch.errors import quiet

# As in FastGen's config of DMD2, but that the fake score's gradient is limited too, and the averages of weights are kept.
_DMD2 = (
    "method=diff_instruct",
    "method.weighting=dmd",
    "method.fake_updates=1",
    "method.sigma_init=80",
    "method.generator_sigmas=${noise_levels.karras}",
    "method.fake_sigmas=${noise_levels.karras}",
    "method.betas=[0.9,0.999]",
    "method.weight_decay=0.01",
    "method.clip=10",
    "callbacks.progress=null",
)
_ENDLESS = 10**9  # steps
_GAN = "method.gan={generator: 1e-3, fake: 1.0, sigmas: '${noise_levels.karras}'}"


class TakeTurns(pl.Callback):
    """Makes each update of a trainer a turn. It ends with the callbacks before this one, and begins with the next batch."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.turns.ready(parameters=sum(p.numel() for p in pl_module.student.network.parameters()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.turns.made(latest_update(pl_module))


def train(turns: Turns, options: Sequence[str], case: Case = CIFAR10) -> None:
    """Train in a temporary folder as train.py does, with options of its, for as long as there are turns."""
    quiet()
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = compose_config(replace(case, overrides=(*case.overrides, *_DMD2)), folder, *options)
        method, trainer = prepare(cfg, _ENDLESS, TakeTurns(turns))
        trainer.fit(method, method.training_data(synthetic(cfg.data, folder)))


def main() -> None:
    """Make updates in turns with another program."""
    parser = update_options()
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    options = [f"batch_size={given.batch_size}", f"trainer.precision={given.precision}"]
    options += [f"trainer.accelerator={'gpu' if given.device == 'cuda' else given.device}"]
    options += [_GAN] if given.gan else []
    train(Turns(given.device, given.threads), [*options, *given.options])


if __name__ == "__main__":
    main()
