"""evaluate.py teacher=NAME steps=[1,2] of published few-step students, whose files are written here in their layouts."""

import pytest
import torch
from edm_pickles import filled, theirs, write_edm
from end_to_end_tools import evaluate, read_json
from openai_unet import OpenAIUNet
from published_files import CLASSES, cifar10, imagenet64

from stillhouse.networks import SongUNet

SHORT = ("evaluation.extractor._target_=cheap_extractor.Cheap", "num_samples=12", "blocks=2", "device=cpu")
DDPMPP = {"model_channels": 16, "num_blocks": 1, "channel_mult": [1, 1], "attn_resolutions": []}


def edms(folder, name, precond, augment_dim, **attributes):
    network = SongUNet(32, 3, 3, augment_dim=augment_dim, **DDPMPP)
    have = {"img_resolution": 32, "img_channels": 3, "label_dim": 0, "sigma_data": 0.5}
    write_edm(folder / f"weights/{name}.pkl", filled(theirs(network)), precond, **have, **attributes)
    sizes = [f"teacher.network.{key}={str(value).replace(' ', '')}" for key, value in DDPMPP.items()]
    return [*cifar10(folder), *sizes]


def ect(folder):
    return edms(folder, "ect-cifar10", "ECMPrecond", 0, sigma_min=0.003)


def sid(folder):
    return edms(folder, "sid-cifar10-uncond-alpha1.2", "EDMPrecond", 9)


def cd(folder):
    torch.manual_seed(0)
    network = OpenAIUNet(16, 128, (1, 1), 1, attended=(8,), width=64, classes=CLASSES)
    torch.save(network.state_dict(), folder / "weights/cd_imagenet64_lpips.pt")
    sizes = ("model_channels=128", "channel_mult=[1,1]", "num_blocks=1", "attn_resolutions=[8]")
    return [*imagenet64(folder), *(f"teacher.network.{size}" for size in sizes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "counts"),
    [("cifar10_ect", ect, [1, 2]), ("cifar10_sid", sid, [1]), ("imagenet64_cd", cd, [1, 2])],
)
def test_it_is_measured_at_the_numbers_of_evaluations_that_it_is_for(tmp_path, name, write, counts):
    (tmp_path / "weights").mkdir()
    options = (f"teacher={name}", *write(tmp_path), *SHORT)
    evaluate(tmp_path, *options, f"steps={counts}".replace(" ", "")).ok()
    found = [
        record for record in read_json(tmp_path / f"runs/teacher-{name}/metrics.json") if record["subject"] == "teacher"
    ]
    assert [record["nfe"] for record in found] == counts
    assert len({record["mean"] for record in found}) == len(counts)
    known = ", ".join(map(str, counts))
    message = f"steps=3: this published student is sampled in {known} and no other number of steps"
    evaluate(tmp_path, *options, "steps=[1,3]").refused(message)
