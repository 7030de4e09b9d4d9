import multiprocessing
import os
import pickle
import random
import signal
import sys

import numpy as np
import pytest
import torch
from picture_files import encoded, folder_of, pattern, zip_of

from datamodules import LSUN, EncodedImages
from datamodules.components import encoded_images as packing
from datamodules.components import partial_folder
from datamodules.components.picture_decoding import Decoder, DecodingRules, centre_crop
from datamodules.lsun import LMDB

lmdb = pytest.importorskip("lmdb")
FORK = multiprocessing.get_context("fork")
SIZES = [(40, 32), (32, 32), (36, 50), (48, 32), (20, 30)]
PICTURES = [pattern(*SIZES[i % 5], shift=i) for i in range(23)]
KINDS = [{"kind": "WEBP", "lossless": True}, {"kind": "JPEG", "quality": 90}, {"kind": "PNG"}]
CONTENT = dict(sorted((f"{i * 7919 % 10007:05x}", encoded(p, **KINDS[i % 3])) for i, p in enumerate(PICTURES)))


def write_lmdb(path, content=CONTENT):
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key.encode(), value)
    return path


def write_folder(path, content=CONTENT):  # as LSUN's own export: a folder per character
    return folder_of(path, {f"{key[0]}/{key[1]}/{key}.webp": value for key, value in content.items()})


def module(folder, path="church_train_lmdb", name="toy", **options):
    common = {"batch_size": 6, "resolution": 32, "num_classes": 0}
    return LSUN(name, str(folder / "data"), path=str(folder / path), **{**common, **options})


def cut(image, where):
    return centre_crop(image, 32)


@pytest.fixture(scope="module")
def church(tmp_path_factory):
    folder = tmp_path_factory.mktemp("church")
    write_lmdb(folder / "church_train_lmdb")
    module(folder).reference()
    return folder


def test_lmdb_folder_and_zip_are_the_same_images(church, tmp_path):
    packed = module(church).reference()
    packed.verify()
    expected = np.stack([pixels[0] for _, pixels in Decoder(cut, DecodingRules()).chunks(CONTENT.items(), 1)])
    images, labels = packed.fetch(np.arange(23))
    assert labels is None
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), expected)
    assert [packed.encoded(i) for i in range(23)] == list(CONTENT.values())
    write_folder(tmp_path / "exported")
    zip_of(tmp_path / "a.zip", {f"exported/{key}.webp": content for key, content in CONTENT.items()})
    for path in ("exported", "a.zip"):
        other = module(tmp_path, path, path).reference()
        assert other.hash == packed.hash
        assert sorted(os.listdir(other.folder)) == ["images.bin", "meta.json", "offsets.npy"]
    assert module(tmp_path, "a.zip", "small", resolution=16).reference().hash != packed.hash


def test_fetch_keeps_the_asked_order_and_a_pickle_is_a_path(church):
    packed = module(church).reference()
    indices = np.array([22, 3, 3, 0])
    every = packed.fetch(np.arange(23))[0]
    assert torch.equal(packed.fetch(indices)[0], every[indices])
    assert packed.fetch(indices[:0])[0].shape == (0, 3, 32, 32)
    data = pickle.dumps(packed)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data).fetch(indices)[0], every[indices])
    with pytest.raises(IndexError, match="indices 23 to 23 exceed the 23 images"):
        packed.fetch(np.array([23]))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(church, workers):
    def batches(num_workers):
        loader = iter(module(church, num_workers=num_workers, seed=3).train_dataloader())
        return [next(loader) for _ in range(9)]  # over two epochs

    for ours, alone in zip(batches(workers), batches(0), strict=True):
        assert torch.equal(ours["image"], alone["image"])
        assert torch.equal(ours["position"], alone["position"])


def pack_until(folder, until, reached):
    def contents(start):
        for number, one in enumerate(list(CONTENT.items())[start:], start):
            if number == until:
                reached.set()
                signal.pause()
            yield one

    meta = {"name": "toy", "classes": 0, "source": "test"}
    return packing.pack_encoded(folder, contents, 23, 10_000, 32, meta=meta, rules=DecodingRules(), identity="a")


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(church, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(partial_folder, "SAVE_SECONDS", 0)
    whole = Decoder.chunks
    monkeypatch.setattr(Decoder, "chunks", lambda self, contents: whole(self, contents, 4))
    reached = FORK.Event()
    child = FORK.Process(target=pack_until, args=(tmp_path / "toy", 14, reached))
    child.start()
    assert reached.wait(20)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    packed = pack_until(tmp_path / "toy", None, reached)
    assert "toy.partial: going on after 12 images" in capsys.readouterr().out
    packed.verify()
    assert packed.hash == module(church).reference().hash
    assert [packed.encoded(i) for i in range(23)] == list(CONTENT.values())


@pytest.mark.parametrize(
    ("name", "message"), [("images.bin", r"is damaged, \d+ bytes"), ("offsets.npy", "is damaged, ")]
)
def test_damage_is_named_with_the_way_out(tmp_path, name, message):
    write_lmdb(tmp_path / "church_train_lmdb")
    path = module(tmp_path).reference().folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(
        OSError, match=f"{name} is damaged, its SHA-256 is not meta.json's: delete the folder|images.bin is"
    ):
        EncodedImages(path.parent).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(OSError, match=f"{name} {message}.*: delete the folder .*toy and run again"):
        EncodedImages(path.parent)


@pytest.mark.parametrize("write", [write_lmdb, write_folder])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(pattern(40, 40), "JPEG")[:700], r"0ffff.* is damaged \(.*truncated"),
        (b"text", "0ffff.* is no picture that Pillow can read, or damaged; replace it or take it out"),
    ],
)
def test_a_broken_picture_shows_before_training(tmp_path, write, content, message):
    write(tmp_path / "source", CONTENT | {"0ffff": content})
    with pytest.raises(OSError, match=message):
        module(tmp_path, "source").prepare_data()
    assert not list((tmp_path / "data").glob("*"))


def test_whoever_stops_reading_an_lmdb_is_not_held_up(tmp_path):
    """By a reader that waits to send more than a pipe holds."""
    path = write_lmdb(tmp_path / "a", {f"{i}": bytes(50_000) for i in range(40)})
    before = set(multiprocessing.active_children())  # of other tests
    contents = LMDB(path).contents()
    next(contents)
    contents.close()
    assert before.issuperset(multiprocessing.active_children())


def test_grey_pictures_are_counted(tmp_path, capsys):
    write_lmdb(tmp_path / "church_train_lmdb", CONTENT | {"0ffff": encoded(pattern(40, 32, 1))})
    packed = module(tmp_path).reference()
    assert "toy: 1 of 24 pictures converted to RGB, the first 0ffff in" in capsys.readouterr().out
    assert len(packed) == 24


def test_transparent_pictures_are_blended_whenever_they_are_fetched(tmp_path, capsys):
    red = np.dstack([np.full((40, 40), 255, np.uint8), *[np.zeros((40, 40), np.uint8)] * 3])
    write_folder(tmp_path / "church_train_lmdb", {"0ffff": encoded(red, mode="RGBA")})
    hashes = set()
    for background, level in (("white", 255), ("black", 0)):
        packed = module(tmp_path, name=background, background=background).reference()
        assert (
            f"{background}: 1 of 1 pictures have transparent parts, blended onto {background}"
            in capsys.readouterr().out
        )
        assert (pickle.loads(pickle.dumps(packed)).fetch(np.array([0]))[0] == level).all()
        hashes.add(packed.hash)
    assert len(hashes) == 2  # of the same bytes
    with pytest.raises(ValueError, match="data.background=white, but .*black was packed with black: delete the folder"):
        module(tmp_path, name="black").check_source()


@pytest.mark.parametrize("size", [0, 4000, 5000, 9000, -4096, -1])
def test_a_cut_lmdb_is_named_before_it_is_read(tmp_path, size):
    """A page that is mapped and not there would end the process by SIGBUS."""
    path = write_lmdb(tmp_path / "church_train_lmdb") / "data.mdb"
    os.truncate(path, size if size >= 0 else os.path.getsize(path) + size)
    with pytest.raises(OSError, match=r"church_train_lmdb is (cut short \(data.mdb has|damaged \().*; unpack it again"):
        module(tmp_path).prepare_data()
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize(("seed", "found"), [(0, "MDB_PAGE_NOTFOUND"), (1, "ended a process"), (3, "MDB_CORRUPTED")])
def test_garbled_pages_are_named(tmp_path, seed, found):
    """Also where the library is ended by SIGBUS."""
    path = write_lmdb(tmp_path / "church_train_lmdb") / "data.mdb"
    content = bytearray(path.read_bytes())
    leaves = [i for i in range(0, len(content), 4096) if content[i + 10] == 2]  # the page's flags
    for page in leaves:
        content[page + 16 : page + 4096] = random.Random(seed).randbytes(4080)
    path.write_bytes(content)
    with pytest.raises(OSError, match=rf"church_train_lmdb is damaged \(.*{found}.*; unpack it again"):
        module(tmp_path).prepare_data()


def test_a_sparse_lmdb_needs_the_space_of_its_pages(tmp_path):
    path = write_lmdb(tmp_path / "church_train_lmdb") / "data.mdb"
    os.truncate(path, 1 << 38)  # as writemap leaves it
    assert len(module(tmp_path).reference()) == 23


def test_values_that_changed_in_place_are_seen(tmp_path, capsys):
    write_lmdb(tmp_path / "church_train_lmdb")
    module(tmp_path).reference()
    os.utime(tmp_path / "church_train_lmdb" / "data.mdb")
    module(tmp_path).check_source()
    assert "differ from when" in capsys.readouterr().out
    key, value = list(CONTENT.items())[11]
    write_lmdb(tmp_path / "church_train_lmdb", {key: value[:-1] + bytes([value[-1] ^ 1])})
    with pytest.raises(
        ValueError, match=r"has changed since .*toy .*23 encoded pictures; now other pictures\): delete"
    ):
        module(tmp_path).check_source()


def test_what_is_no_lmdb_or_has_classes_is_refused(tmp_path, monkeypatch):
    folder_of(tmp_path / "church_train_lmdb", {"data.mdb": b"text"})
    with pytest.raises(OSError, match=r"church_train_lmdb is damaged \(.*; unpack it again"):
        module(tmp_path).prepare_data()
    with pytest.raises(
        ValueError, match="data.num_classes=3: toy is packed as encoded pictures, which have no classes"
    ):
        module(tmp_path, num_classes=3).prepare_data()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"needs the lmdb package; run `pip install -e '.\[lsun\]'`"):
        module(tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match="neither .* nor .*nothing exists; get it by LSUN's download.py"):
        module(tmp_path, "nothing").check_source()
