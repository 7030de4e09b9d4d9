"""Expected bytes: dataset_tool.py of NVlabs/edm at 008a4e5 with --transform=center-crop --resolution=64x64 on the same files."""

import zipfile
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from edm_files import edm_zip
from picture_files import encoded, folder_of, pattern, zip_of
from PIL import Image

from datamodules import ImageNet
from datamodules.components import partial_folder

EDM_HASH = "a9a49bf9867fc4f5e2f93653d52851150101c3fe76e516b859f0e34b74c85f14"
EDM_LABELS = [0, 0, 1, 1, 2]
FILES = {
    "n01440764/n01440764_10.JPEG": encoded(pattern(131, 90)),  # a PNG by content, as one of ILSVRC's is
    "n01440764/n01440764_9.JPEG": encoded(pattern(90, 131, shift=1)),
    "n01443537/a-b.JPEG": encoded(pattern(40, 77, 1)),
    "n01443537/b.JPEG": encoded(pattern(64, 64, shift=2)),
    "n02/x.PNG": encoded(pattern(33, 70, shift=3)),
}


def module(folder, path="train", name="toy", **options):
    common = {"batch_size": 4, "resolution": 64, "num_classes": 3}
    return ImageNet(name, str(folder / "data"), path=str(folder / path), **{**common, **options})


def test_class_folders_are_edms_zip(tmp_path, capsys):
    folder_of(tmp_path / "train", FILES | {"n02/readme.txt": b"none", "n02/.hidden.png": b"none"})
    zip_of(tmp_path / "train.zip", {f"train/{name}": content for name, content in reversed(FILES.items())})
    for name, path in (("folder", "train"), ("zip", "train.zip")):
        packed = module(tmp_path, path, name).reference()
        packed.verify()
        assert packed.hash == EDM_HASH
        assert packed.labels.tolist() == EDM_LABELS
        shown = capsys.readouterr().out.splitlines()
        left_out = f"{name}: 1 of 6 files are no pictures by their names and left out, the first n02/readme.txt"
        assert shown[:-2] == [
            f"{name}: classes by folder: n01440764 -> 0, n01443537 -> 1, n02 -> 2",
            *([left_out] if name == "folder" else []),
        ]
        assert shown[-2].startswith(f"{name}: 1 of 5 pictures converted to RGB, the first ")
        assert shown[-1].startswith(f"{name}: 2 of 5 pictures are smaller than 64 pixels and were enlarged, the first ")
        assert all("n01443537/a-b.JPEG" in line for line in shown[-2:])
    assert packed.meta["preprocessing"].startswith("the middle square, Pillow's Lanczos")
    edm_zip(tmp_path / "edm.zip", packed.images.transpose(0, 2, 3, 1), EDM_LABELS)
    again = module(tmp_path, "edm.zip", "edm").reference()
    assert (again.hash, again.labels.tolist()) == (EDM_HASH, EDM_LABELS)


@pytest.mark.parametrize("kind", ["folder", "edm"])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, capsys, kind):
    folder_of(tmp_path / "folder", FILES)
    whole = module(tmp_path, "folder", "whole").reference()
    edm_zip(tmp_path / "edm", whole.images.transpose(0, 2, 3, 1), EDM_LABELS)
    data, source = module(tmp_path, kind), ImageNet.source

    def interrupted(self):
        def chunks(start):
            for chunk in source(self).chunks(start):
                yield chunk[:2]
                raise KeyboardInterrupt

        return replace(source(self), chunks=chunks)

    monkeypatch.setattr(partial_folder, "SAVE_SECONDS", 0)
    monkeypatch.setattr(ImageNet, "source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    monkeypatch.setattr(ImageNet, "source", source)
    capsys.readouterr()
    assert data.reference().hash == EDM_HASH
    assert "toy.partial: going on after 2 images" in capsys.readouterr().out


def test_other_modes_are_converted_as_pillow_does(tmp_path, capsys):
    odd = {
        "n03/cmyk.jpg": encoded(pattern(70, 70, 4), "JPEG"),
        "n03/grey_alpha.png": encoded(pattern(64, 64, 2), mode="LA"),
        "n03/rgba.png": encoded(pattern(64, 64, 4), mode="RGBA"),
    }
    folder_of(tmp_path / "train", FILES | odd)
    packed = module(tmp_path, num_classes=4).reference()
    assert "toy: 4 of 8 pictures converted to RGB, the first" in capsys.readouterr().out
    rgb = Image.open(BytesIO(odd["n03/cmyk.jpg"])).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(packed.images[-3].transpose(1, 2, 0), np.asarray(rgb))


def test_without_classes_any_folders_do(tmp_path):
    folder_of(tmp_path / "train", FILES)
    packed = module(tmp_path, num_classes=0).reference()
    assert (packed.labels, packed.hash) == (None, EDM_HASH)


JPEG = encoded(pattern(90, 70), "JPEG")


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        (
            {"n02/x.PNG": None},
            {},
            ValueError,
            r"has 2 class folders with pictures \(n01440764, n01443537\), data.num_cl",
        ),
        (
            {"n03/x.png": JPEG},
            {},
            ValueError,
            r"has 4 class folders .*n02, ...\), data.num_classes=3; complete the folder",
        ),
        ({"x.png": JPEG}, {}, ValueError, "x.png in .* lies in no class folder, data.num_classes=3; move it or set"),
        (
            {"n02/y.jpg": JPEG[:900]},
            {},
            OSError,
            r"n02/y.jpg.* is damaged \(.*truncated.*\); replace it or take it out",
        ),
        (
            {"n02/y.jpg": b"text"},
            {},
            OSError,
            "n02/y.jpg.* is no picture that Pillow can read, or damaged; replace it or take it out",
        ),
        ({"n02/y.jpg": b""}, {}, OSError, "n02/y.jpg.* is no picture that Pillow can read, or damaged"),
        (dict.fromkeys(FILES) | {"a": b""}, {}, FileNotFoundError, "holds no pictures of the kinds .bmp"),
    ],
)
@pytest.mark.parametrize("write", [folder_of, zip_of])
def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, write, changes, options, error, message):
    write(tmp_path / "train", {k: v for k, v in (FILES | changes).items() if v is not None})
    with pytest.raises(error, match=message) as caught:
        module(tmp_path, **options).prepare_data()
    assert "train" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("*"))


def test_sixteen_bits_and_damaged_zips(tmp_path):
    deep = BytesIO()
    Image.fromarray(pattern(64, 64, 1).squeeze(-1).astype(np.uint16)).save(deep, "PNG")
    folder_of(tmp_path / "train", {"a/x.png": deep.getvalue()})
    with pytest.raises(ValueError, match=r"a/x.png has 16 bits per channel instead of 8 \(mode I;16\); convert"):
        module(tmp_path, num_classes=0).prepare_data()
    path = zip_of(tmp_path / "train.zip", FILES, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(OSError, match="n01440764_10.JPEG in .*train.zip is damaged .*; copy or make the zip again"):
        module(tmp_path, "train.zip").prepare_data()
    path.write_bytes(content[:-300])
    with pytest.raises(OSError, match=r"train.zip is damaged or cut short .*; copy or make it again"):
        module(tmp_path, "train.zip").prepare_data()
    assert not list((tmp_path / "data").glob("*"))
