"""Small files that would take gigabytes or hours: each reader says so in one line, in little memory and time."""

import gzip
import io
import json
import multiprocessing
import pickle
import resource
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_edm_pickle import Calls, build, edms, tensor, write

from callbacks import read_checkpoint
from datamodules import CIFAR10, DownsampledImageNet, EDMZip, ImageFolder
from launch.run.folder import RunFolder
from stillhouse.checkpoints import DiffusersFolder, EDMPickle, RectifiedFlowCheckpoint
from stillhouse.checkpoints.bounds import check_aliases, check_growth, parse_json
from stillhouse.diffusion.preconditioning import EDM, Velocity
from stillhouse.metrics.records import load_records
from stillhouse.metrics.reference import load_reference
from stillhouse.networks import DiffusersUNet, SongUNet

BOMB = 128 << 20  # bytes that a bomb becomes, over what any file may ask for
MEMORY = 96 << 20  # bytes that a reader may take
SECONDS = 20


def bounded(function: Callable[[], object]) -> Exception | None:
    """What `function` raises in a process that can hardly take more memory than this one has."""

    def act(sender) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        try:
            function()
            sender.send(None)
        except Exception as error:
            sender.send(type(error)(str(error)))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=act, args=(sender,))
    begun = time.monotonic()
    child.start()
    try:
        assert receiver.poll(SECONDS), "it took too long"
        return receiver.recv()
    finally:
        child.kill()
        child.join()
        assert time.monotonic() - begun < SECONDS + 5


def zip_bomb(path: Path, member: str, start: bytes = b"", claimed: int | None = None, fill: bytes = b"\0") -> Path:
    """A zip whose only file is `start` and BOMB bytes `fill`; claimed: the size that its directory gives."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w") as file:
        file.write(start)
        for _ in range(BOMB >> 20):
            file.write(fill * (1 << 20))
    if claimed is not None:
        content = bytearray(path.read_bytes())
        struct.pack_into("<I", content, content.rindex(b"PK\1\2") + 24, claimed)
        path.write_bytes(content)
    return path


def folder(path: Path, name: str, content: bytes) -> Path:
    path.mkdir()
    (path / name).write_bytes(content)
    return path


def large_picture() -> bytes:
    content = io.BytesIO()
    Image.new("1", (16_000, 10_000)).save(content, "PNG")
    return content.getvalue()


def pictures(path: Path, kind: type = ImageFolder, **options) -> Callable[[], object]:
    common = {"batch_size": 1, "resolution": 8, "num_classes": 0} | options
    return kind("toy", str(path.parent / "data"), path=str(path), **common).reference


def packed_tensors(path: Path, content: object) -> Path:
    """As torch.save's, but compressed, as it never does."""
    plain = io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in stored.infolist():
            archive.writestr(info.filename, stored.read(info))
    return path


def expanded(path: Path, content: Callable[[torch.Tensor], object] = lambda value: {"a": value}) -> Path:
    """A tensor of 16 GB that is stored as one number."""
    torch.save(content(torch.zeros(1).expand(1 << 16, 1 << 16)), path)
    return path


def zeros() -> torch.Tensor:
    return torch.zeros(BOMB // 4)


def rectified(path: Path) -> Callable[[], object]:
    network = SongUNet(16, 3, 3, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
    return lambda: RectifiedFlowCheckpoint(str(path)).read(path, network, Velocity())


def averages(value: torch.Tensor) -> dict:
    return {"model": {"module.all_modules.0.W": value}, "ema": {"shadow_params": [value]}, "step": 1}


def diffusers(path: Path) -> Callable[[], object]:
    from stillhouse.diffusion.preconditioning import Epsilon

    network = DiffusersUNet.__new__(DiffusersUNet)
    torch.nn.Module.__init__(network)
    epsilon = Epsilon.__new__(Epsilon)
    torch.nn.Module.__init__(epsilon)
    return lambda: DiffusersFolder(str(path)).read(path, network, epsilon)


def edm(path: Path) -> Callable[[], object]:
    network = build()
    return lambda: EDMPickle(str(path)).read(path, network, EDM())


def doubled(depth: int = 60) -> tuple:
    """A tuple of two equal ones of two equal ones ...: written out it has 2^60 parts."""
    value: tuple = ()
    for _ in range(depth):
        value = (value, value)
    return value


def many_storages() -> bytes:
    """One storage of a megabyte, named 2,000 times."""
    stream = io.BytesIO()
    torch.save(torch.zeros(1 << 18)._typed_storage(), stream, _use_new_zipfile_serialization=False)
    one = stream.getvalue()
    return edms(x=[Calls(torch.storage._load_from_bytes, one) for _ in range(2000)])


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": shape})
    return content.getvalue()


def claims(path: Path, **shapes: tuple[int, ...]) -> Path:
    """An .npz whose arrays say that they are of these shapes, and hold 8 bytes each."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in shapes.items():
            archive.writestr(f"{name}.npy", npy_header(shape, "<f8") + bytes(8))
    return path


def gzipped(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    """cifar-10-python.tar.gz with one file of zeros."""
    info = tarfile.TarInfo(name)
    info.size, info.type = BOMB, kind
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(BOMB >> 20):
            file.write(bytes(1 << 20))
    return path


def batch(path: Path, content: bytes) -> Callable[[], object]:
    path.mkdir()
    for number in range(1, 6):
        (path / f"data_batch_{number}").write_bytes(content)
    return pictures(path, CIFAR10, resolution=32, num_classes=10)


def array_of(shape: tuple[int, ...]) -> bytes:
    """A pickled array of that shape which has three bytes."""
    array = np.zeros(3, np.uint8)
    content = pickle.dumps({"data": array, "labels": [1]}, protocol=2)
    before = pickle.dumps((3,), protocol=2)[2:-1].split(b"q")[0]
    after = pickle.dumps(shape, protocol=2)[2:-1].split(b"q")[0]
    assert content.count(before) == 1
    return content.replace(before, after)


def config(path: Path, text: str) -> Callable[[], object]:
    folder(path, "config.yaml", text.encode())
    return RunFolder(path).read_config


def laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)])


HOSTILE: dict[str, tuple[Callable[[Path], Callable[[], object]], str]] = {
    # pictures
    "zip of a picture": (
        lambda f: pictures(zip_bomb(f / "a.zip", "a.png")),
        r"a.png in .*a.zip is damaged \(a.png: a.png has [\d,]+ bytes and asks for 134,217,728, more than 256 times",
    ),
    "zip that gives another size": (
        lambda f: pictures(zip_bomb(f / "a.zip", "a.png", claimed=1000)),
        "a.zip is damaged",
    ),
    "EDM's zip": (
        lambda f: pictures(zip_bomb(f / "a.zip", "a.png"), EDMZip),
        "a.png in .*a.zip is damaged .*asks for 134,217,728",
    ),
    "large picture": (
        lambda f: pictures(folder(f / "a", "a.png", large_picture())),
        r"a.png is damaged \(it has [\d,]+ bytes and asks for 640,000,000, more than 256 times as many\); replace it",
    ),
    "dataset.json": (
        lambda f: pictures(
            _with_picture(zip_bomb(f / "a.zip", "dataset.json", b'{"labels": [', fill=b"[")), EDMZip, num_classes=2
        ),
        r"dataset.json in .*a.zip is damaged \(.*asks for 134,217,740, more than 16 times",
    ),
    "nested dataset.json": (
        lambda f: pictures(_with_picture(_zip(f / "a.zip", {"dataset.json": b"[" * 200_000})), EDMZip, num_classes=2),
        r"dataset.json in .*a.zip is damaged \(its brackets are nested too deeply\); copy or make the zip again",
    ),
    # arrays
    "npz that claims": (
        lambda f: partial(load_reference, claims(f / "a.npz", mu=(1 << 50,), sigma=(1, 1))),
        r"a.npz is damaged or holds no .*mu.npy announces 9,007,199,254,740,992 bytes of float64 .*, there are 8\)?; delete",
    ),
    "npz that is compressed": (
        lambda f: partial(load_reference, zip_bomb(f / "a.npz", "mu.npy", npy_header((BOMB // 8,), "<f8"))),
        "a.npz is damaged or holds no .*mu.npy has .* more than 16 times as many",
    ),
    "npz of labels": (
        lambda f: pictures(
            claims(_made(f / "a") / "train_data_batch_1.npz", labels=(1 << 50,)).parent, DownsampledImageNet
        ),
        "train_data_batch_1.npz is damaged or cut short .*labels announces 9,007,199,254,740,992 bytes",
    ),
    # archives and pickles of data
    "tar": (
        lambda f: pictures(gzipped(f / "a.tar.gz", "data_batch_1"), CIFAR10, resolution=32, num_classes=10),
        "a.tar.gz is damaged or cut short .*its content has .* more than 16 times as many",
    ),
    "tar with a long header": (
        lambda f: pictures(gzipped(f / "a.tar.gz", "pax", tarfile.XHDTYPE), CIFAR10, resolution=32, num_classes=10),
        "a.tar.gz is damaged or cut short .*more than 16 times as many",
    ),
    "place in a pickle": (
        lambda f: batch(f / "a", b"\x80\x02}r" + struct.pack("<I", 1 << 30) + b"."),
        "data_batch_1 in .*a is not one of CIFAR-10's batches",
    ),
    "array in a pickle": (
        lambda f: batch(f / "a", array_of((1 << 30,))),
        "data_batch_1 in .* is damaged .*an array without its values",
    ),
    # networks
    "nested tuples": (
        lambda f: edm(write(f / "a.pkl", build(), sigma_data=doubled())),
        r"a.pkl has preconditioning.sigma_data=\(\(.*, the configured teacher 0.5",
    ),
    "nested tuples as a size": (
        lambda f: edm(_file(f / "a.pkl", tensor(doubled(), (1,)))),
        "a.pkl is damaged, .*a tensor of impossible shape",
    ),
    "one storage many times": (
        lambda f: edm(_file(f / "a.pkl", many_storages())),
        "a.pkl has another layout .*no list of layers",
    ),
    "rectified flow's, compressed": (
        lambda f: rectified(packed_tensors(f / "a.pth", averages(zeros()))),
        "a.pth is damaged or cut short .*more than 1 times as many",
    ),
    "rectified flow's, expanded": (
        lambda f: rectified(expanded(f / "a.pth", averages)),
        "a.pth is damaged .*more than 4 times",
    ),
    "diffusers', compressed": (
        lambda f: diffusers(packed_tensors(f / "a.bin", {"a": zeros()})),
        "a.bin is damaged or cut short .*more than 1 times as many",
    ),
    "diffusers', expanded": (
        lambda f: diffusers(expanded(f / "a.bin")),
        "a.bin is damaged .*more than 4 times as many",
    ),
    "checkpoint, compressed": (
        lambda f: partial(read_checkpoint, packed_tensors(f / "a.ckpt", {"a": zeros()})),
        "the checkpoint .*a.ckpt is damaged or cut short .*more than 1 times as many.*: put an older copy back",
    ),
    "checkpoint, expanded": (
        lambda f: partial(read_checkpoint, expanded(f / "a.ckpt")),
        "the checkpoint .*a.ckpt cannot be read .*more than 4 times as many",
    ),
    # text
    "aliases": (
        lambda f: config(f / "a", laughs()),
        "config.yaml can't be read .its aliases repeat values without end",
    ),
    "an alias of itself": (
        lambda f: config(f / "a", "a: &a [*a]"),
        "config.yaml can't be read .an alias stands within",
    ),
    "nested YAML": (lambda f: config(f / "a", "a: " + "[" * 5000), "config.yaml can't be read .RecursionError"),
    "nested JSON": (
        lambda f: partial(load_records, _file(f / "metrics.json", b"[" * 200_000)),
        "metrics.json is damaged .*its brackets are nested too deeply",
    ),
}


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _with_picture(path: Path) -> Path:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.png", content.getvalue())
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_file_that_becomes_large_is_refused_in_little_memory(name, tmp_path):
    make, message = HOSTILE[name]
    read = make(tmp_path)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or path.stat().st_size < 2 << 20
    error = bounded(read)
    assert isinstance(error, ValueError | OSError), error
    assert "\n" not in str(error)
    assert len(str(error)) < 600
    with pytest.raises(type(error), match=message):
        raise error


def test_an_honest_alias_is_read():
    check_aliases("a: &a {x: 1}\nb: *a\nc: {long: enough}")


def test_growth_is_measured_by_the_size_beyond_what_any_file_may_have():
    check_growth(1000, 1, "x", factor=2, floor=1000)
    check_growth(2000, 1000, "x", factor=2, floor=1000)
    with pytest.raises(OSError, match="x has 1,000 bytes and asks for 2,001, more than 2 times as many"):
        check_growth(2001, 1000, "x", factor=2, floor=1000)
    assert parse_json(json.dumps([{"a": 1}])) == [{"a": 1}]
