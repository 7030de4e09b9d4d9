"""What W&B keeps of an offline run, read back."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(folder: Path) -> Iterator[Any]:
    """The records of an offline run's file: LevelDB's log format, after 7 bytes of wandb's own.

    Blocks of 32 KiB hold chunks, each behind checksum, length and kind: 1 a whole record, 2, 3, 4 its beginning, middle, end.
    (wandb itself reads such files in its own program alone.)
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for another header: padding
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<4xHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def of_kind(folder: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(folder) if record.WhichOneof("record_type") == kind]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every logged row, in order."""
    return [_values(row.item) for row in of_kind(folder, "history")]


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """Rows with a student's loss by Lightning's number of their batch."""
    return {row["trainer/global_step"]: row for row in rows(folder) if "loss/student" in row}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            found |= _values((record.run.config if kind == "run" else record.config).update)
    return found


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for update in of_kind(folder, "summary"):
        found |= _values(update.update)
    return found


def axes(folder: Path) -> dict[str, str]:
    """{metric or pattern: the metric that is its x axis}, as the last definition of each says."""
    named = {index: metric.name for index, metric in enumerate(of_kind(folder, "metric"), 1)}
    return {
        metric.glob_name or metric.name: metric.step_metric or named.get(metric.step_metric_index, "")
        for metric in of_kind(folder, "metric")
    }


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
