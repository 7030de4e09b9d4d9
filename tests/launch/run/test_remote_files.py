"""Which files a config asks for, and that they are fetched once, on request, by the first process."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules import FashionMNIST
from launch.run.remote_files import RemoteFile, fetch, remote_files


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which this machine serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


def config(url: str) -> dict:
    teacher = {
        "name": "t",
        "weights": "w/t.safetensors",
        "source": {"file": "w/t.pkl", "url": f"{url}/t.pkl", "sha256": None},
    }
    return {
        "method": {"name": "m", "teacher": teacher, "loss": "l2"},
        "teacher": teacher,
        "data": {"name": "d", "root": "data", "path": "data/d.zip", "url": f"{url}/d.zip", "sha256": "ab"},
        "evaluation": {"extractor": {"weights": "w/i.pth", "url": f"{url}/i.pth"}, "reference": None},
        "logger": {"wandb": {"url": None, "path": "x"}},
    }


def test_nodes_with_an_address_are_found_once():
    found = {str(source.file): source for source in remote_files(config("http://a"))}
    assert set(found) == {"w/t.pkl", "data/d.zip", "w/i.pth"}
    assert found["w/t.pkl"].instead == (Path("w/t.safetensors"),)
    assert found["data/d.zip"] == RemoteFile("data", Path("data/d.zip"), "http://a/d.zip", "ab", (Path("data/d"),))
    assert found["w/i.pth"].option == "evaluation.extractor"


def test_files_of_one_folder_may_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", *FashionMNIST.test_files)
    data = {
        "_target_": "datamodules.FashionMNIST",
        "name": "d",
        "root": "data",
        "path": "d",
        "packaged": "debian",
        "url": "http://a/b/",
        "files": dict.fromkeys(names, "ab"),
    }
    files = remote_files({"data": data})

    def missing():
        return [source.file.name for source in files if source.missing]

    copies = (f"d/{names[0][:-3]}", f"debian/{names[0]}", f"debian/{names[0][:-3]}", "data/d")
    assert files[0] == RemoteFile("data", Path(f"d/{names[0]}"), f"http://a/b/{names[0]}", "ab", (*map(Path, copies),))
    assert missing() == [*names]
    Path("debian").mkdir()
    Path(f"debian/{names[0]}").touch()
    Path("d").mkdir()
    Path(f"d/{names[3][:-3]}").touch()  # unpacked
    assert missing() == [*names[1:3]]
    Path("data/d").mkdir(parents=True)  # the training images are packed
    assert missing() == [names[2]]
    Path("data/d/test").mkdir()
    assert missing() == []
    assert (
        remote_files({"data": data | {"files": None}, "teacher": {"path": "t", "url": "http://a", "files": None}}) == []
    )


def test_several_teachers_are_found_and_random_weights_need_nothing():
    many = config("http://a")
    first = many["method"].pop("teacher")
    second = {**first, "source": {**first["source"], "file": "w/other.pkl"}}
    many["method"]["teachers"] = [first, second]
    del many["teacher"]
    assert {str(s.file) for s in remote_files(many)} >= {"w/t.pkl", "w/other.pkl"}
    many["method"]["teachers"][1]["weights"] = None
    assert "w/other.pkl" not in {str(s.file) for s in remote_files(many)}


def test_lpips_needs_its_network_where_it_is_the_loss(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/home/torch")
    one = config("http://a")
    one["method"] |= {"loss": "lpips+l2", "lpips_weights": None}
    assert Path("/home/torch/hub/checkpoints/vgg16-397923af.pth") in {s.file for s in remote_files(one)}
    one["method"]["lpips_weights"] = "v.pth"
    assert Path("v.pth") in {s.file for s in remote_files(one)}


def test_what_is_missing_is_fetched_unless_something_stands_for_it(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, url = served
    for name in ("t.pkl", "d.zip", "i.pth"):
        (folder / name).write_bytes(name.encode())
    asked = config(url)
    asked["data"]["sha256"] = hashlib.sha256(b"d.zip").hexdigest()
    Path("w").mkdir()
    Path("w/t.safetensors").touch()  # converted already
    fetch(asked)
    assert Path("data/d.zip").read_bytes() == b"d.zip"
    assert Path("w/i.pth").read_bytes() == b"i.pth"
    assert not Path("w/t.pkl").exists()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"data: fetching {url}/d.zip to data/d.zip",
        f"evaluation.extractor: fetching {url}/i.pth to w/i.pth",
    ]
    fetch(asked)
    assert not capsys.readouterr().out
    Path("data/d.zip").unlink()
    Path("data/d").mkdir()  # packed already
    fetch(asked)
    assert not Path("data/d.zip").exists()


def test_other_ranks_wait_for_the_first(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked, appear = config(served[1]), []
    monkeypatch.setattr("time.sleep", lambda _: appear.append(1) or fetched())

    def fetched():
        name = ("w/t.pkl", "data/d.zip", "w/i.pth")[len(appear) - 1]
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()

    fetch(asked)  # of which nothing is served
    said = capsys.readouterr().out.splitlines()
    assert len(appear) == len(said) == 3
    assert said[1] == "data: waiting for data/d.zip, which the first process fetches"


def test_what_cannot_be_had_is_said(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="t.pkl could not be fetched .* or put the file at w/t.pkl"):
        fetch(config(served[1]))
