"""metrics.csv: one row per step, one column per metric; the same file whether or not the run was interrupted."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from stillhouse.files import write_file


class CSVLogger(Logger):
    """Appends to `folder`/metrics.csv: `step` (optimiser steps taken), `nimg` (images seen), then every logged key.

    Lightning numbers a batch from 0; here its row is that of the steps taken with it, so that nimg = step * batch_size.
    `batch_size` is the global one. Values of one step share a row. In a new process the first logged step drops the later
    rows of the file: those steps are trained again. (Lightning's own CSVLogger deletes the file.)
    """

    def __init__(self, folder: str | Path, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"CSVLogger: batch_size must be at least 1, got {batch_size}")
        self.path = Path(folder) / "metrics.csv"
        self.batch_size = batch_size
        self._columns = ["step", "nimg"]
        self._last: dict[str, Any] | None = None
        self._last_offset = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has its config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is None:
            raise ValueError("CSVLogger: a metric needs the step it belongs to")
        taken = step + 1
        if self._last is None:
            self._rewind(taken)
        last = self._last
        row = last if last is not None and int(last["step"]) == taken else {}
        row = row | {k: _number(v) for k, v in metrics.items()} | {"step": taken, "nimg": taken * self.batch_size}
        new = [key for key in row if key not in self._columns]
        if new or (last is not None and int(last["step"]) > taken):
            self._columns += new
            self._write_all([*self._read(), row])
        else:
            self._write_last(row, replace=last is not None and int(last["step"]) == taken)

    def _rewind(self, step: int) -> None:
        """Continue an existing file, without the rows after `step` and without a row that a kill cut short."""
        rows = self._read() if self.path.exists() else []
        self._columns = list(rows[0]) if rows else self._columns
        self._write_all([row for row in rows if int(row["step"]) <= step])

    def _read(self) -> list[dict[str, str]]:
        text = self.path.read_text()
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        if (reader.fieldnames or [])[:2] != ["step", "nimg"]:
            raise ValueError(f"{self.path} does not begin with the columns step,nimg: move that file away")
        return list(reader)

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        merged: dict[int, dict[str, Any]] = {}
        for row in rows:
            filled = {k: v for k, v in row.items() if v != ""}
            merged[int(row["step"])] = merged.get(int(row["step"]), {}) | filled
        ordered = [merged[step] for step in sorted(merged)]
        lines = [_line(self._columns)] + [_line([row.get(c, "") for c in self._columns]) for row in ordered]
        write_file(self.path, b"".join(lines))
        self._last = ordered[-1] if ordered else None
        self._last_offset = sum(map(len, lines)) - (len(lines[-1]) if ordered else 0)

    def _write_last(self, row: dict[str, Any], replace: bool) -> None:
        line = _line([row.get(c, "") for c in self._columns])
        try:
            with self.path.open("r+b") as file:
                if not replace:
                    self._last_offset = file.seek(0, os.SEEK_END)
                file.seek(self._last_offset)
                file.write(line)
                file.truncate()
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write {self.path}: {error.strerror}. Make room and run again"
            ) from error
        self._last = row


def _number(value: Any) -> int | float:
    return value if isinstance(value, int | float) else float(value)


def _line(values: list[Any]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue().encode()
