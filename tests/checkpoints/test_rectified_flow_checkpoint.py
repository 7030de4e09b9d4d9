import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from network_tools import noise

from stillhouse.checkpoints import RectifiedFlowCheckpoint, read_card
from stillhouse.checkpoints.rectified_flow import _names
from stillhouse.diffusion.flow import velocity
from stillhouse.diffusion.preconditioning import EDM, Velocity
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import DhariwalUNet, SongUNet

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
# The released code's layers of that network at 16x16, by number.
LAYERS = [
    ("linear", 16, 64),
    ("linear", 64, 64),
    ("conv", 3, 16),
    ("block", 16, 16),
    ("down", 16, 16),
    ("block", 16, 32),
    ("attention", 32, 32),
    ("block", 32, 32),
    ("attention", 32, 32),
    ("block", 32, 32),
    ("block", 64, 32),
    ("block", 48, 32),
    ("attention", 32, 32),
    ("up", 32, 32),
    ("block", 48, 16),
    ("block", 32, 16),
    ("norm", 16, 16),
    ("conv", 16, 3),
]


def parameters() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, in the released code's order."""
    shapes = {}

    def add(name: str, weight: tuple[int, ...], leaves: tuple[str, str] = ("weight", "bias")) -> None:
        matrix = leaves[0] == "W"
        shapes[f"all_modules.{name}.{leaves[0]}"] = weight
        shapes[f"all_modules.{name}.{leaves[1]}"] = (weight[1 if matrix else 0],)

    for number, (kind, width, out) in enumerate(LAYERS):
        if kind in ("linear", "conv", "norm"):
            add(str(number), {"linear": (out, width), "conv": (out, width, 3, 3), "norm": (out,)}[kind])
            continue
        add(f"{number}.GroupNorm_0", (width,))
        if kind == "attention":
            for i in range(4):
                add(f"{number}.NIN_{i}", (width, out), ("W", "b"))
            continue
        add(f"{number}.Conv_0", (out, width, 3, 3))
        add(f"{number}.Dense_0", (out, 64))
        add(f"{number}.GroupNorm_1", (out,))
        add(f"{number}.Conv_1", (out, out, 3, 3))
        if kind != "block" or width != out:
            add(f"{number}.Conv_2", (out, width, 1, 1))
    return shapes


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    new = noise(torch.Size(shape).numel(), *shape)
    return 0.2 * new + name.endswith("weight") if len(shape) == 1 else new / new[0].numel() ** 0.5


def checkpoint(**changes) -> dict:
    shapes = parameters()
    model = {"module.sigmas": torch.ones(1000)}  # wrapped for several devices, as released
    model |= {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    ema = {
        "decay": 0.999999,
        "num_updates": 8,
        "shadow_params": [filled(name, shape) for name, shape in shapes.items()],
    }
    return {
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "model": model,
        "ema": ema,
        "step": 8,
        **changes,
    }


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "flow").mkdir()
    torch.save(checkpoint(), tmp_path / "flow/checkpoint_8.pth")
    return tmp_path / "flow/checkpoint_8.pth"


def build(**options) -> SongUNet:
    torch.manual_seed(0)
    return SongUNet(16, 3, 3, **{**SMALL, **options})


def teacher(file: Path, network=None, preconditioning=None) -> Teacher:
    weights = str(file.parent.with_suffix(".safetensors"))
    source = RectifiedFlowCheckpoint(str(file))
    return Teacher(
        "rf", network or build(), preconditioning or Velocity(), flow_uniform, weights=weights, source=source
    )


def test_the_layers_are_those_of_the_released_code():
    """The digest: SHA-256 over the lines "name (shape)" of gnobitab/RectifiedFlow's own NCSNpp (commit 5a1fd4d), in its order."""
    text = "\n".join(f"{name} {shape}" for name, shape in parameters().items())
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a134a43e674820d8694dd323ef7803532842bc36d1bd5516be5fed827314b645"
    )


def test_the_published_network_has_as_many_parameters():
    """61,804,419 in 564 tensors, counted in the released code; our attentions hold three of theirs as one."""
    with torch.device("meta"):
        network = SongUNet(32, 3, 3, channel_mult=(1, 2, 2, 2))
    assert sum(p.numel() for p in network.parameters()) == 61_804_419
    names = dict(_names(network))
    assert set(names.values()) == set(network.state_dict())
    assert len(names) + 4 * sum(".qkv.W" in name for name in names) == 564


def test_a_checkpoints_velocity_is_that_of_the_released_code(file):
    """`expected`: 8 pixels that gnobitab/RectifiedFlow's own network (commit 5a1fd4d) makes of these averages and inputs."""
    expected = [0.43166, -0.75137, 0.00846, 0.41377, 0.57866, 0.121, 0.19384, 0.19573]
    flow = teacher(file)
    z, t = noise(1, 2, 3, 16, 16), torch.tensor([0.25, 0.9], dtype=torch.float64)
    with torch.no_grad():
        out = flow.denoiser.network(z, (999 * t).float())
        drift = velocity(flow.denoiser, z, t)
    torch.testing.assert_close(drift, out, rtol=1e-4, atol=1e-4)
    pixels = out.flatten(1)[:, [0, 17, 391, 767]].flatten()
    torch.testing.assert_close(pixels, torch.tensor(expected), rtol=0, atol=3e-5)
    source = read_card(file.parent.with_suffix(".safetensors"))["source"]
    assert (source["class"], source["step"]) == ("ExponentialMovingAverage of NCSNpp", 8)


@pytest.mark.parametrize(
    ("network", "preconditioning", "message"),
    [
        (lambda: build(channel_mult=(1, 2, 2)), Velocity, "does not fit this SongUNet: missing: "),
        (lambda: build(num_blocks=2), Velocity, "does not fit this SongUNet: missing: "),
        (lambda: build(attn_resolutions=()), Velocity, "does not fit this SongUNet: missing: .*; unexpected: "),
        (lambda: build(embedding="fourier"), Velocity, "missing: embed.noise.freqs"),
        (lambda: build(num_classes=4), Velocity, "missing: embed.label.bias"),
        (lambda: build(model_channels=32), Velocity, "of another shape: "),
        (lambda: build(resample_filter=(1, 3, 3, 1)), Velocity, "resample_filter, of taps=2, the configured teacher 4"),
        (build, EDM, "preconditioning='Velocity', the configured teacher 'EDM'"),
        (lambda: DhariwalUNet(16, 3, 3, model_channels=64, attn_resolutions=()), Velocity, "not a DhariwalUNet"),
    ],
)
def test_another_network_is_named(file, network, preconditioning, message):
    with pytest.raises(ValueError, match=f"checkpoint_8.pth .*{message}") as caught:
        teacher(file, network(), preconditioning())
    assert "\n" not in str(caught.value)


def test_another_file_is_refused(file):
    for content, message in (
        ({"model": {}}, "holds no network with its averages"),
        (checkpoint(ema={"shadow_params": [torch.zeros(1)]}), "holds no network with its averages"),
        (
            checkpoint(ema={"shadow_params": [torch.zeros(1)] * len(parameters())}),
            "averages that are not those of its network",
        ),
        ([1], "holds no network with its averages"),
        (checkpoint(step=torch.zeros(3)), "holds no network with its averages"),
        (checkpoint(ema={"shadow_params": [1.0] * len(parameters())}), "holds no network with its averages"),
        (checkpoint(step=shutil.rmtree), "was refused: .* nothing in it was executed"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=message) as caught:
            teacher(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(OSError, match=r"is damaged or cut short .* fetch it again"):
        teacher(file)


def test_matrices_of_odd_shapes_are_named(file):
    content = torch.load(file)
    names = [name for name in content["model"] if not name.endswith("sigmas")]
    number = next(i for i, name in enumerate(names) if name.endswith("NIN_1.W"))
    for shape in ((), (2, 2, 2, 2)):
        content["model"][names[number]] = content["ema"]["shadow_params"][number] = torch.zeros(shape)
        torch.save(content, file)
        with pytest.raises(
            ValueError, match="does not fit this SongUNet: missing: .*qkv.weight; unexpected: .*NIN_0.W"
        ):
            teacher(file)
