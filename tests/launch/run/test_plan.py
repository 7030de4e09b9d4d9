"""plan=true: numbers against what a real network keeps, and nothing started."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from method_runs import METHODS, twins_slow
from torch import nn

from launch.errors import EXPECTED
from launch.run.names import register_resolvers
from launch.run.plan import plan
from launch.run.teachers import expand_teachers

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def planned(*arguments: str) -> str:
    cfg = compose("config", list(arguments))
    expand_teachers(cfg)
    return plan(cfg)


def test_a_run_that_lacks_everything_is_told_so(tmp_path):
    elsewhere = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "trainer.compile=reduce-overhead")
    text = planned("method=disback", "data=ffhq64", "trainer.devices=8", *elsewhere)
    assert "channels-last (trainer.channels_last=auto, for bf16-mixed on a GPU, compiled)" in text
    assert "100,000 steps of 256 images (32 on each of 8 devices), 25,600 kimg" in text
    assert "61,805,571 of the student (SongUNet), trained networks of this kind: 2" in text
    for missing in ("edm-ffhq-64x64-uncond-vp", "no ffhq64 images", "weights-inception-2015-12-05-6726825d.pth"):
        assert sum(missing in line for line in text.partition("parameters")[0].splitlines()) == 1, text
    # Two networks with gradients and moments, an average of one, and one target with its rounded weights.
    assert f"{61_805_571 * 4 * (2 * 4 + 1 + 1.5) / 1e9:.3g} GB for weights" in text
    assert f"{61_805_571 * 4 * 5 / 1e9:.3g} GB degradation path of 5 nodes" in text
    assert f"{2 * 5000 * 256:,} before the first step" in text
    assert "2,500 per kimg: 1,000 student, 1,000 fake score, 500 teacher" in text
    assert not list(tmp_path.iterdir())


def test_stored_samples_are_counted_with_their_evaluations():
    text = planned()
    assert "contiguous (trainer.channels_last=auto, for 32-true on a CPU)" in text
    assert "nothing" in text.partition("parameters")[0]
    assert f"{(8192 + 1024) * 19:,} before the first step" in text
    assert "9,216 stored samples" in text
    assert "last.ckpt, best.ckpt" in text


def test_activations_are_what_autograd_keeps_of_a_real_evaluation():
    from stillhouse.networks import SongUNet

    text = planned("batch_size=2")
    network = SongUNet(8, 1, 1, 10, 0, 32, (1, 1), num_blocks=1, attn_resolutions=(4,), dropout=0.0, label_dropout=0.1)
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in network.parameters()}
    held: list[nn.Module | torch.Tensor] = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held.append(network(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)))
    (line,) = (line for line in text.splitlines() if "keeps for its backward pass" in line)
    assert float(line.split()[0]) == pytest.approx(2 * sum(kept.values()) / 1000, rel=0.02)  # kB


SMALL = "teacher.network.num_blocks=1"  # where sizes are not looked at: layers take time also without weights


def test_weights_of_a_loss_and_students_of_rounds_are_named():
    assert "vgg16-397923af.pth; add download=true to fetch https://" in planned("method=bezier", "data=cifar10")
    text = planned("method=progressive", "data=cifar10", SMALL)
    assert "students of 12 rounds before the last" in text
    assert "after rounds/4096: " in text


AUGMENTED = ["method=pretrain", "method.augment=0.15", "data.flip=false", "teacher.network.augment_dim=9"]


@pytest.mark.parametrize(
    "options",
    [
        ["method=pretrain", "data=cifar10"],  # whose recipe augments
        ["method=pretrain", "data=ffhq64"],
        [*AUGMENTED, "data=imagenet64"],
        [*AUGMENTED, "data=image_folder", "data.path=mine"],
        [*AUGMENTED, "data=celeba64", "teacher=ffhq64"],
        ["method=pretrain", "method.augment=0.15", "teacher.network.augment_dim=9"],  # the digits are never flipped
        ["method=disback", "recipe=disback_imagenet64_gan", "data=imagenet64"],
        ["trainer.devices=8", "trainer.num_nodes=2", "trainer.accelerator=gpu", "trainer.precision=16-mixed"],
    ],
    ids=lambda options: "-".join(options[:2]),
)
def test_what_would_run_is_planned(options, tmp_path):
    """Also for a machine with other devices than this one."""
    assert "per kimg" in planned(*options, SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # what the network alone can tell
        (["method=pretrain", "method.augment=0.15"], "augment_dim=9, got a SongUNet with 0: set that"),
        (["method=pretrain", "method.augment=0.15", "data=celeba64"], "got a SongUNet with 0: set that"),
        (["method=pretrain", "data=cifar10", "data.flip=true"], "set data.flip=false"),
        (["teacher.network.model_channels=0"], "model_channels"),
        (["method=flow_distill", "method.loss=lpips"], "at least 32x32"),
        (
            ["method=flow_distill", "data=cifar10", "teacher=cifar10_rf2", "method.loss=lpips", "method.lpips_resize=8"],
            "lpips_resize",
        ),
        # what a trainer, its callbacks and the evaluation can tell
        (["trainer.validate_every_n_steps=0"], "validate_every_n_steps"),
        (["batch_size=15", "trainer.devices=2"], "batch_size=15"),
        (["method=imm", "batch_size=12", "trainer.devices=2"], "can't be divided into groups of method.group_size=4"),
        (["trainer.accelerator=abacus"], "abacus"),
        (["method=disback", "callbacks.checkpoints.every_n_steps=0"], "every_n_steps"),
        (["data=cifar10", "callbacks.metrics.num_samples=1"], "num_samples must be"),
        (["evaluation.metrics=[fib]"], "metrics fib are unknown"),
        (["method=diff_instruct", "data=imagenet64", "trainer.precision=16-mixed",
          "recipe=disback_imagenet64_gan", "method=disback"], "method.gan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_the_run_would_refuse_is_refused(options, message):
    with pytest.raises(EXPECTED, match=re.escape(message)):
        planned(*options)


def test_weights_that_are_there_are_checked(tmp_path):
    (tmp_path / "small.safetensors").write_bytes(b"cut short")
    with pytest.raises(OSError, match="damaged, cut short"):
        planned("teacher.weights=small.safetensors")
    with pytest.raises(ValueError, match="does not fit this SongUNet"):
        planned("teacher.network.model_channels=8")


@pytest.mark.parametrize("method", twins_slow(METHODS))
def test_debug_shrinks_all_that_takes_time(method):
    method, _, host = method.partition(" ")
    options = [f"host={host}"] if host else ["teacher.solver=renoising"] if method == "tcm" else []
    text = planned(f"method={method}", *options, "trainer=debug")
    trained = [int(steps) for steps in re.findall(r"(?<!degradation: )\b(\d+) steps of 16 images", text)]
    assert sum(trained) == 10
    before = re.search(r"([\d,]+) before the first step", text)
    assert int((before[1] if before else "0").replace(",", "")) <= (
        1200 if method == "bezier" else 600
    )  # of two teachers
    stored = re.search(r"([\d,]+) stored samples", text)
    assert int(stored[1] if stored else "0") <= 160
