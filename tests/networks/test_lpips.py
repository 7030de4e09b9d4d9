"""LPIPS with random weights in the real ones' format; the real ones are not here."""

import socket
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.nn.functional import interpolate
from vgg_file import vgg16_state, write_vgg16

from stillhouse.checkpoints.lpips import URL, load_lpips

GENERATOR = torch.Generator().manual_seed(3)
A = torch.rand(3, 3, 32, 40, generator=GENERATOR) * 2 - 1
B = (A + 0.3 * torch.randn(A.shape, generator=GENERATOR)).clamp(-1, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_vgg16(tmp_path_factory.mktemp("vgg") / "vgg16.pth")


@pytest.fixture(scope="module")
def lpips(weights):
    return load_lpips(weights)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def test_values_and_gradients_are_torchmetrics(lpips, monkeypatch):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    vgg = torchvision.models.vgg
    features = vgg.make_layers(vgg.cfgs["D"])
    state = vgg16_state()
    features.load_state_dict({name[9:]: value for name, value in state.items() if name.startswith("features.")})
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=features))
    theirs = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net

    a, a_theirs = A.clone().requires_grad_(), A.clone().requires_grad_()
    ours, expected = lpips(a, B), theirs(a_theirs, B).flatten()
    assert ours.shape == (3,)
    assert ours.min() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    ours.sum().backward()
    expected.sum().backward()
    assert a.grad.abs().max() > 1e-5
    torch.testing.assert_close(a.grad, a_theirs.grad, rtol=1e-3, atol=1e-7)


def test_it_is_a_distance_per_image(lpips):
    b = B.clone()
    b[1] = A[1]
    distance = lpips(A, b)
    assert distance[1] == 0
    torch.testing.assert_close(distance, lpips(b, A))
    torch.testing.assert_close(distance[2:], lpips(A[2:], b[2:]))
    same = A.clone().requires_grad_()
    lpips(same, A).sum().backward()
    assert not same.grad.any()
    black = torch.full_like(A, -1.0, requires_grad=True)
    lpips(black, A).sum().backward()
    assert black.grad.isfinite().all()


def test_float32_under_autocast_and_for_other_dtypes(lpips):
    expected = lpips(A, B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips(A, B), expected)
    distance = lpips(A.double(), B.double())
    assert distance.dtype == torch.float32
    assert torch.equal(distance, expected)


def test_it_is_frozen(lpips, weights):
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not lpips.training
    lpips.train()  # changes nothing: there is no dropout and no statistic
    values = lpips(A, B)
    lpips.eval()
    assert torch.equal(lpips(A, B), values)
    assert sum(p.numel() for p in lpips.parameters()) == 14_714_688 + 1472  # the classifier's 124 million are left out


def test_smaller_images_are_enlarged(lpips, weights):
    larger = load_lpips(weights, resize=48)
    up_a, up_b = (interpolate(x, (48, 48), mode="bilinear") for x in (A, B))
    torch.testing.assert_close(larger(A, B), lpips(up_a, up_b))
    torch.testing.assert_close(larger(up_a, up_b), lpips(up_a, up_b))
    assert (larger(A, B) - lpips(A, B)).abs().min() > 1e-4
    for resize in (16, "224", 224.0):
        with pytest.raises(ValueError, match=r"^method.lpips_resize must be an integer of at least 32, got "):
            load_lpips(weights, resize=resize)


@pytest.mark.parametrize(
    ("shape", "named"), [((1, 32, 32), "1x32x32"), ((3, 31, 64), "3x31x64"), ((1, 8, 8), "1x8x8"), ((32, 32), "32x32")]
)
def test_other_images_are_refused(lpips, shape, named):
    images = torch.zeros(2, *shape)
    message = rf"^LPIPS is for RGB images of at least 32x32, this data has {named}; choose another method.loss$"
    with pytest.raises(ValueError, match=message):
        lpips(images, images)


def test_weights_are_found_where_torchvision_keeps_them_and_never_downloaded(weights, tmp_path, monkeypatch, offline):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    usual = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    message = rf"no VGG-16 weights at {usual}; add download=true to fetch {URL}, or say .* by method.lpips_weights$"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_lpips()
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=rf"no VGG-16 weights at {tmp_path}/gone.pth; add download=true"):
        load_lpips(str(tmp_path / "gone.pth"))
    usual.parent.mkdir(parents=True)
    usual.symlink_to(weights)
    load_lpips()
    assert torchvision.models.VGG16_Weights.IMAGENET1K_V1.url == URL


def test_making_it_leaves_the_random_state_alone(weights):
    before = torch.get_rng_state()
    load_lpips(weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_both_formats_are_read_and_the_file_may_go(lpips, tmp_path):
    path = write_vgg16(tmp_path / "zip.pth", published=False)
    other = load_lpips(path)
    path.write_bytes(b"")
    assert torch.equal(other(A, B), lpips(A, B))


class Bad:
    def __reduce__(self):
        return (pytest.fail, ("what a pickle says was run",))


@pytest.mark.parametrize("published", [True, False])
def test_damaged_and_malicious_files_are_refused(tmp_path, published):
    path = write_vgg16(tmp_path / "a.pth", published)
    for content in (path.read_bytes()[:-1000], b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"a.pth is damaged or no file of weights; delete it and fetch it again$"):
            load_lpips(path)
    torch.save(Bad(), path, _use_new_zipfile_serialization=not published)
    with pytest.raises(OSError, match=r"a.pth is damaged or no file of weights"):
        load_lpips(path)


def test_only_vgg16s_convolutions_are_read(lpips, tmp_path):
    path, state = tmp_path / "a.pth", vgg16_state()
    convolutions = {name: value for name, value in state.items() if name.startswith("features.")}
    torch.save(convolutions, path)
    assert torch.equal(load_lpips(path)(A, B), lpips(A, B))
    name = "features.28.weight"
    others = {
        "deeper": state | {"features.30.weight": state[name]},
        "shallower": {key: value for key, value in state.items() if key != name},
        "narrower": state | {name: state[name][:, :256]},
        "no tensor": state | {name: 3},
        "without names": {3: torch.zeros(3)},
        "no dict": torch.zeros(3),
    }
    for content in others.values():
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"a.pth holds weights of another network; fetch .*pth$") as caught:
            load_lpips(path)
        assert "\n" not in str(caught.value)
