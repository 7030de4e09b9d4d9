"""Where a teacher's weights come from; how it samples is tested with the solvers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.checkpoints.published import PublishedCheckpoint
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)


class NumberFile(PublishedCheckpoint):
    """Reads a file of one number as the weights of a `Net`."""

    def read(self, file, network, preconditioning):
        value = float(file.read_text())
        return {name: torch.full_like(old, value) for name, old in network.state_dict().items()}, {"class": "Number"}


def teacher(weights: str, source: PublishedCheckpoint | None) -> Teacher:
    return Teacher("t", Net(), EDM(), karras, weights=weights, source=source, licence="L")


def test_misuse():
    with pytest.raises(ValueError, match="^teacher.name='a/b' must name one folder below data/"):
        Teacher("a/b", Net(), EDM(), karras)
    with pytest.raises(ValueError, match=r"^100000000000 solver steps of teacher t \(lower them\): .* GB of memory"):
        Teacher("t", Net(), EDM(), karras).sigmas(10**11)


def test_missing_weights_are_made_of_the_source_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number.txt").write_text("2.5")
    first = teacher("weights/number.safetensors", NumberFile("number.txt", url="https://there/number.txt"))
    assert (first.denoiser.network.conv.weight == 2.5).all()
    card = json.loads(Path("weights/number.json").read_text())
    assert (card["licence"], card["source"]["class"], card["source"]["url"]) == (
        "L",
        "Number",
        "https://there/number.txt",
    )
    (tmp_path / "number.txt").write_text("3")
    assert teacher("weights/number.safetensors", NumberFile("number.txt")).hash == first.hash
    (tmp_path / "number.txt").unlink()
    assert teacher("weights/number.safetensors", NumberFile("number.txt")).hash == first.hash


def test_another_process_may_make_them_meanwhile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number.txt").write_text("2.5")

    class Slow(NumberFile):
        def read(self, file, network, preconditioning):
            teacher("number.safetensors", NumberFile("number.txt"))  # the other process
            return super().read(file, network, preconditioning)

    assert (teacher("number.safetensors", Slow("number.txt")).denoiser.network.conv.bias == 2.5).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["number.json", "number.safetensors", "number.txt"]


@pytest.mark.parametrize(
    ("url", "way"),
    [
        (
            "https://there/number.txt",
            "; add download=true to fetch https://there/number.txt, or put the file there, or set",
        ),
        (None, "; put the file there, or set"),
    ],
)
def test_both_missing_files_and_the_way_out_are_named(url, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        teacher("weights/number.safetensors", NumberFile("number.txt", url=url))
    message = str(caught.value)
    assert message.startswith(f"no weights at {tmp_path}/weights/number.safetensors or ")
    assert f", nor {tmp_path}/number.txt that they are made of{way} teacher.weights (null: random weights)" in message


def test_a_source_is_unused_without_weights_and_wrong_ones_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Teacher("t", Net(), EDM(), karras, source=NumberFile("nowhere/number.txt")).weights is None

    class Wrong(PublishedCheckpoint):
        def read(self, file, network, preconditioning):
            return {"conv.weight": torch.zeros(3, 3, 1, 1), "other": torch.zeros(1)}, {}

    (tmp_path / "number.txt").write_text("2.5")
    with pytest.raises(ValueError, match=r"number.txt does not fit this Net: missing: conv.bias; unexpected: other"):
        teacher("number.safetensors", Wrong("number.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["number.txt"]


def test_weights_of_another_name_are_not_made_of_it(tmp_path, monkeypatch):
    """A student that is not trained yet must not become its teacher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number.txt").write_text("2.5")
    with pytest.raises(FileNotFoundError) as caught:
        teacher("runs/first/student.safetensors", NumberFile("number.txt"))
    message = str(caught.value)
    assert message.startswith(f"no weights at {tmp_path}/runs/first/student.safetensors or ")
    assert message.endswith(
        ", and number.txt becomes only number.safetensors; train them first, or set teacher.weights"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["number.txt"]
