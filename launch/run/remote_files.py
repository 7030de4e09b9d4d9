"""What a config needs from elsewhere: published weights, data sets and statistics. Fetched on request alone (download=true)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.option_types import find_target
from launch.process_environment import is_rank_zero
from stillhouse.checkpoints.download import download
from stillhouse.checkpoints.weights import find_weights

_FILES = ("file", "path", "weights")  # the key beside `url` that says where its file lies
_POLL = 1.0  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file that a config names together with its address. instead: what is made of it, or a copy: any does in its place."""

    option: str
    file: Path
    url: str
    sha256: str | None = None
    instead: tuple[Path, ...] = ()

    @property
    def missing(self) -> bool:
        return not any(map(exists, (self.file, *self.instead)))


def exists(path: Path) -> bool:
    """Whether a file or folder is in the current folder or, for weights, in the project's."""
    try:
        return path.expanduser().exists() or bool(find_weights(path))
    except FileNotFoundError:
        return False


def remote_files(config: dict[str, Any]) -> list[RemoteFile]:
    """Each file with an address in a resolved config, once: in nodes with `url` and one of `file`, `path` and `weights`.

    With `files`, names with their SHA-256, the address and the path are folders of these, as is `packaged`, of copies; with
    files=null none is asked for. Unpacked ones (without .gz) do as well.
    """
    files = {source.file: source for source in (*_walk(config, "", ()), *_perceptual(config.get("method") or {}))}
    return list(files.values())


def fetch(config: dict[str, Any]) -> None:
    """Download what is missing, in the first process; others that were started beside it wait for each file.

    Raises:
        OSError, ValueError: As `download`.
    """
    for source in remote_files(config):
        if not source.missing:
            continue
        if is_rank_zero():
            print(f"{source.option}: fetching {source.url} to {source.file}", flush=True)
            download(source.url, source.file, source.sha256)
        else:
            print(f"{source.option}: waiting for {source.file}, which the first process fetches", flush=True)
            while source.missing:
                time.sleep(_POLL)


def _perceptual(method: dict[str, Any]) -> Iterator[RemoteFile]:
    if "lpips" in str(method.get("loss")):
        from stillhouse.checkpoints.lpips import URL, vgg16_file

        yield RemoteFile("method.lpips_weights", vgg16_file(method.get("lpips_weights")), URL)


def _packed(node: dict[str, Any], option: str, name: str | None = None) -> tuple[Path, ...]:
    """Where the images of a data set, or of one of its files, are once they are packed."""
    if not {"name", "root"} <= set(node):
        return ()
    folder = Path(node["root"]) / str(node["name"])
    test_files = getattr(find_target(node["_target_"], option), "test_files", ()) if "_target_" in node else ()
    return (folder / "test" if name in test_files else folder,)


def _walk(node: Any, option: str, instead: tuple[Path, ...]) -> Iterator[RemoteFile]:
    if isinstance(node, list):
        for index, part in enumerate(node):
            yield from _walk(part, f"{option}[{index}]", ())
    if not isinstance(node, dict):
        return
    place = next((key for key in _FILES if node.get(key)), None)
    if node.get("url") and place:
        if "files" in node:
            folders = [Path(node[key]) for key in (place, "packaged") if node.get(key)]
            for name, sha256 in (node["files"] or {}).items():
                file, *copies = [folder / form for folder in folders for form in (name, name.removesuffix(".gz"))]
                url, instead = f"{node['url'].rstrip('/')}/{name}", (*copies, *_packed(node, option, name))
                yield RemoteFile(option, file, url, sha256, instead)
        else:
            instead = _packed(node, option) or instead
            yield RemoteFile(option, Path(node[place]), node["url"], node.get("sha256"), instead)
    for key, part in node.items():
        if key == "source" and not node.get("weights"):  # a network with random weights needs none
            continue
        made = (Path(node["weights"]),) if key == "source" else ()
        yield from _walk(part, f"{option}.{key}" if option else str(key), made)
