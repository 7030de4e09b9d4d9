"""The two updates of DMD2 in NVIDIA's FastGen, from a checkout of it: of the fake score, and of the generator.

FastGen is Apache-2.0, and nothing of it is kept here. Beside torch, torchvision, omegaconf and hydra-core its DMD2 at this size
takes attrs. The packages of its other networks, data and logs, old ones of some, are imported and not used: stand-ins take their
places (with them and with the packages the updates give the same weights, to the last bit).
"""

import sys
from itertools import cycle
from pathlib import Path

import torch

from benchmarks.stand_ins import stand_in
from benchmarks.turns import CYCLE, Turns, update_options

# What FastGen imports for other things than these updates; the second ones are used by packages that these need, if there.
_UNUSED = (
    "accelerate",
    "av",
    "boto3",
    "botocore",
    "cv2",
    "diffusers",
    "einops",
    "ftfy",
    "imageio",
    "loguru",
    "sentencepiece",
)
_UNUSED += ("timm", "transformers", "wandb", "webdataset")
_UNUSED_IF_ABSENT = ("pandas", "psutil", "requests", "scipy")


def check_checkout(folder: str | Path) -> Path:
    """The folder of a checkout, absolute.

    Raises:
        ValueError: Where it is none.
    """
    folder = Path(folder).resolve()
    if not (folder / "fastgen" / "methods").is_dir():
        raise ValueError(
            f"--fastgen={folder} is no checkout of FastGen, it has no fastgen/methods: git clone https://github.com/NVlabs/FastGen"
        )
    return folder


class FastGenUpdates:
    """FastGen's DMD2Model at EDM's CIFAR-10 architecture, unconditional, with random weights, in its trainer's own step.

    Its config of DMD2 as it is: AdamW, the student's gradient checked and limited, no average of the weights; the noise level
    uniform over EDM's levels. With `gan` its discriminator learns along, on the teacher's features. The images are random.

    Args:
        folder: Of the checkout.
        device: cpu or cuda.
        batch_size: Of an update.
        precision: 32-true, tf32 or bf16-mixed.
        gan: Whether with its GAN.
    """

    def __init__(self, folder: str | Path, *, device: str, batch_size: int, precision: str, gan: bool = False):
        sys.path.insert(0, str(check_checkout(folder)))
        stand_in(_UNUSED, _UNUSED_IF_ABSENT)
        from fastgen.callbacks.callback import CallbackDict
        from fastgen.configs.methods.config_dmd2 import create_config
        from fastgen.trainer import Trainer
        from fastgen.utils import instantiate, logging_utils, scripts

        logging_utils.logger.remove()
        torch.manual_seed(0)
        config = create_config()
        settings, trainer = config.model, config.trainer
        settings.device, settings.net.label_dim = device, 0
        settings.precision_amp = "bfloat16" if precision == "bf16-mixed" else None
        settings.student_update_freq = len(CYCLE)
        if not gan:
            settings.gan_loss_weight_gen = 0.0
        trainer.callbacks = {"grad_clip": trainer.callbacks.grad_clip}  # the others log, by Weights & Biases
        trainer.tf32_enabled = precision != "32-true"
        scripts.set_cuda_backend(trainer.cudnn.deterministic, trainer.cudnn.benchmark, trainer.tf32_enabled)

        config.model_class.config = settings
        self.model = instantiate(config.model_class)
        weights = self.model.teacher.state_dict()
        for network in (self.model.net, self.model.fake_score):
            network.load_state_dict(weights)
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.trainer = Trainer.__new__(Trainer)  # without what its construction starts
        self.trainer.config, self.trainer.callbacks = config, CallbackDict(config, self.trainer)
        shape = (batch_size, *settings.input_shape)
        self.batch = {"real": torch.randn(shape, device=device), "condition": None, "neg_condition": None}
        self.parameters = sum(parameter.numel() for parameter in self.model.net.parameters())

    def update(self, kind: str) -> None:
        """One update, "fake" or "generator", with its optimiser's step."""
        iteration = 1 + CYCLE.index(kind)  # it updates the student where the cycle's length divides it
        self.trainer.train_step(self.model, self.model, self.batch, iteration, grad_accum_iter=0)


def main() -> None:
    """Make updates in turns with another program."""
    parser = update_options()
    parser.add_argument("--fastgen", required=True)
    options = parser.parse_args()
    turns = Turns(options.device, options.threads)
    what = {"device": options.device, "precision": options.precision, "batch_size": options.batch_size}
    program = FastGenUpdates(options.fastgen, gan=options.gan, **what)
    turns.ready(parameters=program.parameters)
    for kind in cycle(CYCLE):
        program.update(kind)
        turns.made(kind)


if __name__ == "__main__":
    main()
