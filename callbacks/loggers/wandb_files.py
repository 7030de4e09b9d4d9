"""The content of W&B's file of an offline run, also of one that was killed."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = 7  # bytes: of wandb at the beginning of a file, and of LevelDB before each chunk
_BLOCK = 32768


def read_wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a run-*.wandb, up to where a kill cut it off.

    LevelDB's log format: blocks of 32 KiB hold chunks, each behind checksum, length and kind: 1 a whole record, 2, 3, 4 its
    beginning, middle, end. (wandb itself reads such files in its own program alone.)
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # too little for another chunk's header: padding
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)
        end = place + _HEADER + length
        if kind not in (1, 2, 3, 4) or end > len(data):
            return
        parts += data[place + _HEADER : end]
        place = end
        if kind in (1, 4):
            record = Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            parts = b""
            yield record


def wandb_values(items: Any) -> dict[str, Any]:
    """The values of a record's items, by their names."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every logged row, in order."""
    for record in read_wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            yield wandb_values(record.history.item)
