"""What a file may ask of its reader: memory within a stated multiple of its own size, and JSON that does not nest without end.

Compressed files, claimed shapes and values that are shared many times let a small file become gigabytes.
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from torch import Tensor

FACTOR = 16
FLOOR = 1 << 26  # bytes that any file may ask for


def check_growth(asked: int, size: int, what: str, *, factor: int = FACTOR, floor: int = FLOOR) -> None:
    """Refuse what would become much larger in memory than it is on disk.

    Args:
        asked: bytes in memory.
        size: bytes as it is stored.
        what: its name, for the message.
        factor: how many times `size` it may have.
        floor: bytes that it may have in any case.

    Raises:
        OSError: where it asks for more.
    """
    if asked > max(factor * size, floor):
        raise OSError(f"{what} has {size:,} bytes and asks for {asked:,}, more than {factor} times as many")


def read_zipped(archive: zipfile.ZipFile, member: str | zipfile.ZipInfo, **bounds: int) -> bytes:
    """Read one file of a zip whole.

    Args:
        archive: the zip.
        member: the file's name or entry.
        **bounds: `factor` and `floor` of `check_growth`.

    Raises:
        OSError: for a size beyond the bounds.
        KeyError: where there is no such file.
        zipfile.BadZipFile: for damage.
    """
    info = archive.getinfo(member) if isinstance(member, str) else member
    check_growth(info.file_size, info.compress_size, info.filename, **bounds)
    with archive.open(info) as file:
        return file.read(info.file_size)  # without a number all would be unpacked before it is cut to that size


def array_header(file: BinaryIO, size: int, what: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of a .npy file, and leave the file at its data.

    Args:
        file: open at its beginning.
        size: the file's bytes.
        what: its name, for messages.

    Returns:
        The array's shape and dtype.

    Raises:
        OSError: for as many bytes of data as the header does not announce.
        ValueError: for Fortran's order, for objects, or for what is no .npy at all.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if (fortran and len(shape) > 1) or dtype.hasobject:
        raise ValueError(f"{what} is of an unknown layout")
    announced, there = dtype.itemsize, size - file.tell()
    for length in shape:
        announced *= length  # of any size, where numpy's product would run over
    if announced != there:
        raise OSError(f"{what} announces {announced:,} bytes of {dtype} {shape}, there are {there:,}")
    return shape, dtype


def read_arrays(path: str | Path, names: Iterable[str]) -> list[np.ndarray | None]:
    """Read arrays of an .npz file by their names, None for an absent one.

    Raises:
        OSError: for sizes beyond the bounds.
        zipfile.BadZipFile: for damage, as numpy's errors.
    """
    arrays: list[np.ndarray | None] = []
    with zipfile.ZipFile(path) as archive:
        present = set(archive.namelist())
        for name in names:
            if f"{name}.npy" not in present:
                arrays.append(None)
                continue
            info = archive.getinfo(f"{name}.npy")
            check_growth(info.file_size, info.compress_size, info.filename)
            with archive.open(info) as file:
                shape, dtype = array_header(file, info.file_size, info.filename)
                arrays.append(np.frombuffer(file.read(info.file_size), dtype).reshape(shape))
    return arrays


class BoundedStream:
    """A stream that is unpacked while it is read, and refuses to be read beyond the bounds of its stored size.

    Args:
        file: the unpacked content.
        size: bytes as it is stored.
        what: its name, for messages.
        **bounds: `factor` and `floor` of `check_growth`.
    """

    def __init__(self, file: BinaryIO, size: int, what: str, **bounds: int):
        self._file, self._size, self._what, self._bounds = file, size, what, bounds

    def read(self, count: int) -> bytes:
        check_growth(self.tell() + count, self._size, self._what, **self._bounds)
        return self._file.read(count)

    def seek(self, place: int, whence: int = 0) -> int:
        if whence == 0:
            check_growth(place, self._size, self._what, **self._bounds)
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()


def check_archive(path: Path) -> None:
    """Refuse a zip file whose members are larger than itself: torch.save compresses nothing. Other formats pass.

    Raises:
        OSError: for larger ones.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            asked = sum(info.file_size for info in archive.infolist())
        check_growth(asked, path.stat().st_size, path.name, factor=1, floor=0)


def check_tensors(content: Any, path: Path) -> Any:
    """Refuse nested containers of tensors that would not fit into four times the size of the file they come from.

    Tensors may be views that repeat a few stored values without end; a copy of such a one would not be small.

    Args:
        content: what was read.
        path: the file.

    Returns:
        The content itself.

    Raises:
        OSError: for larger tensors.
    """
    size, total, stored, seen = path.stat().st_size, 0, {}, set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            total += value.numel() * value.itemsize
            stored[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    check_growth(sum(stored.values()), size, path.name, factor=1, floor=0)
    check_growth(total, size, path.name, factor=4, floor=0)
    return content


def parse_json(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: for what is no JSON, or nests deeper than Python can follow.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def check_aliases(text: str) -> None:
    """Refuse YAML whose aliases (`*name`) would make it have more values than it has letters.

    A copy is made of an aliased value wherever it stands, hence of an alias of aliases any number.

    Raises:
        ValueError: for such YAML.
    """
    if "*" not in text:
        return
    root, sizes, under_way = yaml.compose(text, yaml.SafeLoader), {}, set()

    def values(node: yaml.Node) -> int:
        if id(node) in under_way:
            raise ValueError("an alias stands within what it names")
        if id(node) not in sizes:
            under_way.add(id(node))
            items = node.value if isinstance(node, yaml.CollectionNode) else ()
            flat = (item for pair in items for item in pair) if isinstance(node, yaml.MappingNode) else items
            sizes[id(node)] = 1 + sum(map(values, flat))
            under_way.discard(id(node))
        return sizes[id(node)]

    if root is not None and values(root) > len(text):
        raise ValueError("its aliases repeat values without end")
