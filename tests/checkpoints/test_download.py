"""Downloads from a server on this machine: whole or not at all, resumed, verified."""

import fcntl
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from stillhouse.checkpoints.download import download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; `breaks` bytes end the next answer early."""

    breaks: int | None = None
    etag = '"one"'
    asked: list

    def do_GET(self):
        kind, span = type(self), self.headers.get("Range")
        kind.asked.append((span, self.headers.get("If-Range")))
        if self.path == "/gone":
            return self.send_error(404)
        start = 0
        if span and self.headers.get("If-Range") == kind.etag:
            start = int(span.removeprefix("bytes=").rstrip("-"))
        if start == len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if kind.etag:
            self.send_header("ETag", kind.etag)
        self.end_headers()
        body = CONTENT[start:]
        self.wfile.write(body if kind.breaks is None else body[: kind.breaks])
        kind.breaks = None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.asked, Server.breaks, Server.etag = [], None, '"one"'
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/file"
    http.shutdown()


def broken_off(server, path, count=1_234_567):
    Server.breaks = count
    with pytest.raises(OSError, match=f"could not be fetched .* run again to go on from {count} bytes"):
        download(server, path, SHA256)
    assert not path.exists()


def test_a_file_arrives_whole_and_leaves_nothing_else(server, tmp_path):
    path = tmp_path / "deep/file"
    assert download(server, path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    download(server, path)
    assert len(Server.asked) == 1  # what exists is not asked for


def test_a_broken_download_goes_on_where_it_was(server, tmp_path):
    path = tmp_path / "file"
    broken_off(server, path)
    download(server, path, SHA256)
    assert path.read_bytes() == CONTENT
    assert Server.asked == [(None, None), ("bytes=1234567-", '"one"')]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("etag", ['"two"', None, 'W/"one"'])
def test_another_version_on_the_server_is_fetched_anew(server, tmp_path, etag):
    path = tmp_path / "file"
    Server.etag = etag if etag != '"two"' else '"one"'
    broken_off(server, path)
    Server.etag = etag
    download(server, path, SHA256)
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_complete_needs_only_its_name(server, tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(CONTENT)
    (tmp_path / "file.part.version").write_text('"one"')
    download(server, path, SHA256)
    assert path.read_bytes() == CONTENT


def test_another_hash_is_refused_and_the_part_deleted(server, tmp_path):
    with pytest.raises(OSError, match=f"has SHA-256 {SHA256}, expected 0000"):
        download(server, tmp_path / "file", "0" * 64)
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / "file.part").exists()


def test_misuse(server, tmp_path):
    with pytest.raises(OSError, match=r"/gone could not be fetched \(Not Found\).* put the file at .*file"):
        download(server.replace("/file", "/gone"), tmp_path / "file")
    with pytest.raises(OSError, match="could not be fetched"):
        download("http://127.0.0.1:9/file", tmp_path / "file")
    with pytest.raises(ValueError, match="is no address"):
        download("file:///etc/passwd", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    with open(tmp_path / "file.part.lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as another process would hold it
        with pytest.raises(OSError, match="another process is downloading"):
            download(server, tmp_path / "file")
