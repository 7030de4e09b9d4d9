"""Files from the network, on request alone: resumed where a try broke off, verified, and there whole or not at all."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from stillhouse.checkpoints.weights import hash_file
from stillhouse.file_locks import hold_lock

_BLOCK = 1 << 20
_SILENCE = 60  # seconds without a byte after which a server is given up


def download(url: str, path: str | Path, sha256: str | None = None) -> Path:
    """Fetch a file; an existing one stays as it is.

    What has arrived lies in PATH.part, beside the server's mark of the version (PATH.part.version), and the same call again goes
    on from there if the server still has that version and can; else it begins anew.

    Args:
        url: an address, http or https.
        path: where the file should be.
        sha256: of the whole file, 64 hex digits.

    Returns:
        The file's path.

    Raises:
        OSError: for a server that cannot be reached or breaks off, another hash (what has arrived is then deleted), another
            process that downloads the same file, or a full disk.
        ValueError: for an address of another kind.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url} is no address to download {path} from; give one that begins with https://")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with _exclusive(part) as file:
        if path.exists():  # another process was faster
            return path
        try:
            _receive(url, path, file)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise OSError(
                f"{url} could not be fetched ({reason}); run again to go on from {file.tell()} bytes, or put the file at {path}"
            ) from error
        file.flush()
        os.fsync(file.fileno())
        if sha256 is not None and (actual := hash_file(part)) != sha256.lower():
            part.unlink()
            _version(path).unlink(missing_ok=True)
            raise OSError(
                f"{url} has SHA-256 {actual}, expected {sha256}; it was deleted: fetch it again or correct sha256"
            )
        os.replace(part, path)
        _version(path).unlink(missing_ok=True)
    return path


@contextmanager
def _exclusive(part: Path) -> Iterator[BinaryIO]:
    """Open PATH.part at its end, for one process at a time; an empty one does not stay."""
    lock_file = part.with_name(f"{part.name}.lock")
    refusal = OSError(f"another process is downloading {part}; wait for it and run again")
    with hold_lock(lock_file, refusal):
        try:
            with open(part, "ab") as file:
                yield file
        finally:
            if part.is_file() and not part.stat().st_size:  # open() also refuses a folder
                part.unlink()
            lock_file.unlink(missing_ok=True)


def _receive(url: str, path: Path, file: BinaryIO) -> None:
    have, version = file.tell(), _version(path)
    headers = {"User-Agent": "stillhouse", "Accept-Encoding": "identity"}
    if have and version.exists():
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text()}
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=_SILENCE)
    except urllib.error.HTTPError as error:
        # Nothing is left to send: a kill came between the last byte and the new name.
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return
        if error.code == 416:  # the part is no beginning of that file
            file.truncate(0)
        raise
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            have = 0
            file.seek(0)
            file.truncate()
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if mark is None or mark.startswith("W/"):  # a weak mark does not promise the same bytes
                version.unlink(missing_ok=True)
            else:
                version.write_text(mark)
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True, mininterval=2, leave=False)
        with bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() != total:
            raise http.client.IncompleteRead(b"", total - file.tell())


def _version(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.version")
