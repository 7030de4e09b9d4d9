"""A few images of every data set of conf/data, in the layout in which each is published, and the options that fit them."""

import gzip
import pickle
import struct
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from edm_files import edm_zip
from picture_files import encoded, folder_of, pattern, zip_of

COUNT = 20
CLASSES = 2


def cifar10(folder: Path) -> list[str]:
    """The archive for Python, whose batches are pickles of Python 2's time."""
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for batch in range(1, 6):
            pixels = np.stack(
                [pattern(32, 32, shift=4 * batch + i).transpose(2, 0, 1).ravel() for i in range(COUNT // 5)]
            )
            content = pickle.dumps({b"data": pixels, b"labels": [i % 10 for i in range(COUNT // 5)]}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{batch}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return ["data.path=cifar-10-python.tar.gz", "data.sha256=null"]


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes, packed by gzip."""
    return gzip.compress(struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def fashion_mnist(folder: Path) -> list[str]:
    for part in ("train", "t10k"):
        images = np.stack([pattern(28, 28, shift=i)[..., 0] for i in range(COUNT)])
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(COUNT, dtype=np.uint8) % 10))
    return ["data.path=.", "data.files=null", "data.resolution=16"]


def celeba64(folder: Path) -> list[str]:
    names = [f"{i:06d}.jpg" for i in range(1, COUNT + 1)]
    files = {f"img_align_celeba/{name}": encoded(pattern(178, 218, shift=i), "JPEG") for i, name in enumerate(names)}
    zip_of(folder / "img_align_celeba.zip", files)
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} 0\n" for name in names))
    return ["data.path=.", "data.resolution=16"]


def ffhq64(folder: Path) -> list[str]:
    edm_zip(folder / "ffhq.zip", np.stack([pattern(16, 16, shift=i) for i in range(COUNT)]))
    return ["data.path=ffhq.zip", "data.resolution=16"]


def imagenet64(folder: Path) -> list[str]:
    wordnet = ("n01440764", "n01443537")
    files = {
        f"{w}/{w}_{i}.JPEG": encoded(pattern(40, 30, shift=i), "JPEG") for w in wordnet for i in range(COUNT // CLASSES)
    }
    folder_of(folder / "train", files)
    return ["data.path=train", "data.resolution=16", f"data.num_classes={CLASSES}"]


def imagenet64_downsampled(folder: Path) -> list[str]:
    labels = [1 + i % CLASSES for i in range(COUNT)]
    pixels = np.stack([pattern(64, 64, shift=i).transpose(2, 0, 1).ravel() for i in range(COUNT)])
    batches = {}
    for batch in range(1, 11):
        content = BytesIO()
        part = slice((batch - 1) * COUNT // 10, batch * COUNT // 10)
        np.savez(content, data=pixels[part], labels=np.array(labels[part]), mean=pixels.mean(0))
        batches[f"train_data_batch_{batch}.npz"] = content.getvalue()
    for part, chosen in (("part1", range(1, 6)), ("part2", range(6, 11))):
        names = [f"train_data_batch_{batch}.npz" for batch in chosen]
        zip_of(folder / f"Imagenet64_train_{part}_npz.zip", {name: batches[name] for name in names})
    (folder / "map_clsloc.txt").write_text("n02119789 1 kit_fox\nn02100735 2 English_setter\n")
    return ["data.path=.", f"data.num_classes={CLASSES}"]


def lsun_church(folder: Path) -> list[str]:
    import lmdb

    with lmdb.open(str(folder / "church_outdoor_train_lmdb"), map_size=1 << 24) as environment:
        with environment.begin(write=True) as transaction:
            for i in range(COUNT):
                transaction.put(f"{i:040x}".encode(), encoded(pattern(48, 40, shift=i), "WEBP"))
    return ["data.path=church_outdoor_train_lmdb", "data.resolution=16", "data.num_workers=0"]


def lsun_bedroom(folder: Path) -> list[str]:
    folder_of(folder / "bedroom", {f"{i:040x}.webp": encoded(pattern(48, 40, shift=i), "WEBP") for i in range(COUNT)})
    return ["data.path=bedroom", "data.resolution=16", "data.num_workers=0"]


def image_folder(folder: Path) -> list[str]:
    folder_of(folder / "my_photos", {f"{i}.jpg": encoded(pattern(50, 30, shift=i), "JPEG") for i in range(COUNT)})
    return ["data.path=my_photos", "data.resolution=16"]


def drawn_here(folder: Path) -> list[str]:
    return []


PUBLISHED: dict[str, Callable[[Path], list[str]]] = {
    "digits": drawn_here,
    "checkerboard": drawn_here,
    "eight_gaussians": drawn_here,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "celeba64": celeba64,
    "ffhq64": ffhq64,
    "imagenet64": imagenet64,
    "imagenet64_downsampled": imagenet64_downsampled,
    "lsun_bedroom": lsun_bedroom,
    "lsun_church": lsun_church,
    "image_folder": image_folder,
}
