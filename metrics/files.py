"""Files that appear whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename; missing folders are made.

    Raises OSError, naming the file, where the disk refuses; an existing file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path}: {error}; free some space there or choose another folder") from error
