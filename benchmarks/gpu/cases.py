"""What the stages train: the methods with their variants, the published architectures, and a tiny one."""

from benchmarks.cases import Case
from benchmarks.methods import CIFAR10, IMAGENET64, METHODS

_GAN = "method.gan={generator:3e-3,fake:1e-2,sigmas:${noise_levels.karras}}"  # as in conf/recipe/disback_imagenet64_gan.yaml
GAN = ("method=diff_instruct", _GAN)
# Beside `METHODS`: other forms of a method that take other paths through its code.
VARIANTS: dict[str, tuple[str, ...]] = {
    "diff_instruct, GAN": GAN,
    "disback, GAN": (*METHODS["disback"], _GAN),
    "sfd, 1 to 4 steps": ("method=sfd", "method.steps=[1,2,3,4]"),
    "bezier, prediction and drift": (*METHODS["bezier"], "method.drift=1.0"),
}
ALL_METHODS = {**METHODS, **VARIANTS}

# No progress bars among the lines of progress, and no TensorBoard, which a bare machine may lack.
_BARE = ("callbacks.progress=null", "logger=csv")
_RANDOM = ("batch_size=4", "teacher.weights=null", "teacher.sha256=null", "teacher.network.model_channels=8")
TINY = Case("the digits' architecture, shrunken", ("data=digits", "~recipe", *_RANDOM, *_BARE))
ARCHITECTURES = {
    "cifar10": Case(CIFAR10.title, (*CIFAR10.overrides, *_BARE)),
    "imagenet64": Case(IMAGENET64.title, (*IMAGENET64.overrides, *_BARE)),
    "tiny": TINY,
}
