"""Published few-step students, in files of their layouts that are written here: read, sampled as published, measured."""

import pytest
import torch
from edm_pickles import filled, theirs, write_edm
from network_tools import noise
from openai_unet import OpenAIUNet
from test_edm_pickle import build, write

from stillhouse.checkpoints import ConsistencyModelCheckpoint, EDMPickle
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM, EDM1000, Consistency
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import few_levels
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import DhariwalUNet

ADM = {"num_classes": 5, "model_channels": 128, "channel_mult": (1, 2), "num_blocks": 2, "attn_resolutions": (4,)}


def ect(path, **attributes):
    return write(path, build(), "ECMPrecond", **({"sigma_min": 0.003, "sigma_data": 0.5} | attributes))


def test_ects_network_is_edms_read_as_a_consistency_function(tmp_path):
    network, same = build(), build()
    preconditioning = Consistency(EDM(), 0.003)
    state, facts = EDMPickle("").read(ect(tmp_path / "ect.pkl"), network, preconditioning)
    network.load_state_dict(state)
    same.load_state_dict(EDMPickle("").read(write(tmp_path / "edm.pkl", build()), same, EDM())[0])
    assert facts == {"class": "ECMPrecond of SongUNet"}
    x, labels, sigma = 3 * noise(2 * 3 * 16 * 16, 2, 3, 16, 16), torch.tensor([1, 3]), torch.tensor([0.5, 20.0])
    level = sigma[:, None, None, None]
    f = same(x / (level**2 + 0.25).sqrt(), sigma.log() / 4, labels)  # of training/networks.py, outside of training
    expected = 0.25 / ((level - 0.003) ** 2 + 0.25) * x + (level - 0.003) * 0.5 / (level**2 + 0.25).sqrt() * f
    torch.testing.assert_close(Denoiser(network, preconditioning)(x, sigma, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preconditioning", "message"),
    [
        (EDM(), "preconditioning='Consistency', the configured teacher 'EDM'"),
        (Consistency(EDM(), 0.002), "preconditioning.sigma_min=0.003, the configured teacher 0.002"),
        (Consistency(EDM(0.7), 0.003), "preconditioning.of.sigma_data=0.5, the configured teacher 0.7"),
        (Consistency(EDM1000(), 0.003), "preconditioning.of='EDM', the configured teacher 'EDM1000'"),
    ],
)
def test_another_reading_of_ects_network_is_refused(preconditioning, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EDMPickle("").read(ect(tmp_path / "ect.pkl"), build(), preconditioning)


def test_sidas_network_is_edms_by_another_name(tmp_path):
    have = {"img_resolution": 16, "img_channels": 3, "label_dim": 4, "sigma_data": 0.5}
    names = "EDMPrecond_EncoderDecoder", "SongUNet_EncoderDecoder"
    sida = write_edm(tmp_path / "sida.pkl", filled(theirs(build())), *names, **have)
    state, facts = EDMPickle("").read(sida, build(), EDM())
    plain, _ = EDMPickle("").read(write(tmp_path / "edm.pkl", build()), build(), EDM())
    torch.testing.assert_close(state, plain, rtol=0, atol=0)
    assert facts == {"class": "EDMPrecond_EncoderDecoder of SongUNet_EncoderDecoder"}


def cd(path):
    """A small network in the layout of cd_imagenet64_lpips.pt, and the file."""
    torch.manual_seed(0)
    network = OpenAIUNet(8, 128, (1, 2), 2, attended=(4,), width=64, classes=5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    torch.save(network.state_dict(), path)
    return network


def test_a_released_consistency_models_output_is_the_same(tmp_path):
    released = cd(tmp_path / "cd.pt")
    network, preconditioning = DhariwalUNet(8, 3, 3, **ADM), Consistency(EDM1000(), 0.002)
    teacher = Teacher(
        *("cd", network, preconditioning, lambda steps: few_levels(steps, [80.0, 1.38])),
        weights=str(tmp_path / "cd.safetensors"),
        source=ConsistencyModelCheckpoint(str(tmp_path / "cd.pt")),
        solver="renoising",
        solver_options={"sigma_min": 0.002},
        steps=1,
    )

    def denoise(x, t, labels):
        """cm/karras_diffusion.py, with the scalings of the boundary condition."""
        f = released(x / (t**2 + 0.25) ** 0.5, torch.full((len(x),), t).log() * 250, labels)
        return 0.25 / ((t - 0.002) ** 2 + 0.25) * x + (t - 0.002) * 0.5 / (t**2 + 0.25) ** 0.5 * f

    z, labels = sample_noise(torch.arange(3), (3, 8, 8)), torch.tensor([4, 0, 2])
    with torch.no_grad():
        one = denoise(80 * z, 80.0, labels)
        torch.testing.assert_close(teacher.sample(z, labels), one, rtol=1e-3, atol=1e-3)
        renoised, two = teacher.trajectory(z, labels, steps=2)
        added = (renoised - one) / (1.38**2 - 0.002**2) ** 0.5
        assert added.std() == pytest.approx(1, abs=0.1)
        assert torch.corrcoef(added.flatten(1)).triu(1).abs().max() < 0.2  # each sample's own
        torch.testing.assert_close(two.float(), denoise(renoised.float(), 1.38, labels), rtol=1e-3, atol=1e-3)
        for sigma in (0.002, 0.3, 1.38):
            x = one + sigma * z
            ours = teacher.denoiser(x, torch.tensor(sigma), labels)
            torch.testing.assert_close(ours, denoise(x, sigma, labels), rtol=1e-3, atol=1e-3)
    assert [teacher.nfe(steps) for steps in (1, 2)] == [1, 2]
    with pytest.raises(
        ValueError, match="steps=3: this published student is sampled in 1, 2 and no other number of steps"
    ):
        teacher.nfe(3)


def test_what_is_no_consistency_model_is_refused(tmp_path):
    cd(tmp_path / "cd.pt")
    reading = Consistency(EDM1000(), 0.002)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    refused = [
        ("cd.pt", DhariwalUNet(8, 3, 3, **ADM), EDM(), "preconditioning='Consistency', the configured teacher 'EDM'"),
        ("cd.pt", DhariwalUNet(8, 3, 3, **ADM), Consistency(EDM()), "preconditioning.of='EDM1000', the configured"),
        ("cd.pt", build(), reading, "holds ADM's U-Net, not a SongUNet"),
        ("nested.pt", DhariwalUNet(8, 3, 3, **ADM), reading, "is no state dict; take a published file"),
    ]
    for name, network, preconditioning, message in refused:
        with pytest.raises(ValueError, match=message):
            ConsistencyModelCheckpoint("").read(tmp_path / name, network, preconditioning)
