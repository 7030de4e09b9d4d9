import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from network_tools import noise, randomised

from stillhouse.checkpoints import DiffusersFolder, read_card
from stillhouse.diffusion.preconditioning import EDM, Epsilon
from stillhouse.diffusion.schedules import ddim_uniform
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import DiffusersUNet, SongUNet

TINY = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "norm_groups": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build(**options) -> DiffusersUNet:
    return DiffusersUNet(8, 3, 3, **{**TINY, **options})


@pytest.fixture(scope="module")
def model() -> UNet2DModel:
    torch.manual_seed(3)
    return randomised(UNet2DModel(**build().config))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A folder as published, config and scheduler at its root."""
    model.save_pretrained(tmp_path / "ddpm")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def teacher(file: Path, weights: Path, network=None, preconditioning=None, steps: int = 10) -> Teacher:
    network, preconditioning = network or build(), preconditioning or Epsilon()
    source = DiffusersFolder(str(file))
    return Teacher(
        "ddpm", network, preconditioning, ddim_uniform, weights=str(weights), source=source, solver="euler", steps=steps
    )


def test_a_folders_network_and_its_ddim_samples_are_those_of_diffusers(model, folder, tmp_path):
    ours = teacher(folder / WEIGHTS, tmp_path / "ddpm.safetensors")
    x, index = noise(1, 4, 3, 8, 8), torch.tensor([0.0, 3.0, 500.0, 999.0])
    with torch.no_grad():
        torch.testing.assert_close(ours.denoiser.network(x, index), model(x, index).sample, rtol=0, atol=1e-5)
        scheduler = DDIMScheduler.from_pretrained(folder)
        scheduler.set_timesteps(10)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t).sample, t, state, eta=0.0).prev_sample
    torch.testing.assert_close(ours.sample(x), state, rtol=1e-4, atol=1e-4)
    source = read_card(tmp_path / "ddpm.safetensors")["source"]
    assert source["class"] == "UNet2DModel"
    assert source["checked"] == ["config.json", "scheduler_config.json"]


def test_the_files_of_2022_and_pipelines_are_read(model, folder, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in model.state_dict().items():
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.")
        state[name] = value
    assert any("query" in name for name in state)
    unet = tmp_path / "pipeline/unet"
    unet.mkdir(parents=True)
    torch.save(state, unet / "diffusion_pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    for key in ("add_attention", "class_embed_type", "num_class_embeds", "downsample_type", "dropout"):
        del config[key]  # not known then
    (unet / "config.json").write_text(json.dumps(config))
    (tmp_path / "pipeline/scheduler").mkdir()
    shutil.copy(folder / "scheduler_config.json", tmp_path / "pipeline/scheduler")
    first = teacher(unet / "diffusion_pytorch_model.bin", tmp_path / "pipeline.safetensors")
    assert first.hash == teacher(folder / WEIGHTS, tmp_path / "b/ddpm.safetensors").hash
    assert read_card(tmp_path / "pipeline.safetensors")["source"]["checked"] == ["config.json", "scheduler_config.json"]
    (folder / "config.json").unlink()
    (folder / "scheduler_config.json").unlink()
    assert first.hash == teacher(folder / WEIGHTS, tmp_path / "c/ddpm.safetensors").hash  # the weights alone
    assert read_card(tmp_path / "c/ddpm.safetensors")["source"]["checked"] == []


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"norm_eps": 1e-5}, "norm_eps=1e-05, the configured teacher 1e-06"),
        ("config.json", {"downsample_padding": 1}, "downsample_padding=1, the configured teacher 0"),
        ("config.json", {"flip_sin_to_cos": True}, "flip_sin_to_cos=True, the configured teacher False"),
        (
            "config.json",
            {"block_out_channels": [8, 8]},
            r"block_out_channels=\[8, 8\], the configured teacher \[8, 16\]",
        ),
        ("config.json", {"attention_head_dim": 8}, "attention_head_dim=8, the configured teacher None"),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "_class_name='UNet2DConditionModel'"),
        ("scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ("scheduler_config.json", {"beta_schedule": "scaled_linear"}, "beta_schedule='scaled_linear'"),
        ("scheduler_config.json", {"beta_start": "x" * 9000}, "which are no betas"),
        ("scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps=500, the configured teacher 1000"),
        (
            "scheduler_config.json",
            {"beta_end": 0.012},
            "beta_end=0.012, other noise levels than teacher.preconditioning",
        ),
    ],
)
def test_another_configuration_is_named(folder, tmp_path, file, changes, message):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"{file} has .*{message}") as caught:
        teacher(folder / WEIGHTS, tmp_path / "ddpm.safetensors")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_or_is_no_file_of_tensors_is_refused(folder, tmp_path):
    weights = tmp_path / "ddpm.safetensors"
    with pytest.raises(ValueError, match="holds a UNet2DModel of diffusers, not a SongUNet"):
        teacher(folder / WEIGHTS, weights, SongUNet(8, 3, 3, model_channels=8, channel_mult=(1,), attn_resolutions=()))
    with pytest.raises(ValueError, match="preconditioning='Epsilon', the configured teacher 'EDM'"):
        teacher(folder / WEIGHTS, weights, preconditioning=EDM())
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json is damaged .* fetch it again"):
        teacher(folder / WEIGHTS, weights)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit this DiffusersUNet: missing: .*; unexpected: "):
        teacher(folder / WEIGHTS, weights, build(num_blocks=2, attn_resolutions=()))
    cut = folder / "cut.safetensors"
    cut.write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(OSError, match=r"cut.safetensors is damaged or cut short .* delete it and fetch it again"):
        teacher(cut, weights)
    hostile = folder / "evil.bin"
    torch.save({"conv_in.weight": shutil.rmtree}, hostile)
    with pytest.raises(ValueError, match=r"evil.bin was refused: .* nothing in it was executed"):
        teacher(hostile, weights)
    torch.save([1], hostile)
    with pytest.raises(ValueError, match=r"evil.bin holds no tensors by name"):
        teacher(hostile, weights)
    assert not weights.exists()
