"""Weights & Biases: curves over images seen, under a run id that a resumed run keeps."""

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from callbacks.loggers.wandb_files import read_wandb_rows
from stillhouse.analysis.curves import metric_with_count, read_metrics_csv
from stillhouse.files import write_file
from stillhouse.metrics.records import Record

_COLUMNS = ["metric", "subject", "name", "weights", "NFE", "mean", "std", "images/s", "fingerprint"]
_PICTURES = ("samples", "interpolation", "curves")


class WandbRun(WandbLogger):
    """Every row has `nimg` (images seen), the x axis of every curve; sections are what stands before a key's slash.

    The run stays open after training, for `log_final`, and is ended by `close`. `batch_size` is the global one; `log_model`:
    whether `log_final` keeps the student's evaluated weights as an artifact. Nothing else of the weights is ever uploaded.

    A resumed run sends first what W&B lacks of the steps before, from metrics.csv (pictures stay in samples/), and nothing
    again that W&B has: it repeats the steps after its checkpoint with the same values. What W&B has is in the offline files
    of the run's folder, by key, and online in the summary that W&B hands a resumed run, by the images seen.
    """

    def __init__(self, *, batch_size: int, log_model: bool, id_file: Path, **options: Any) -> None:
        super().__init__(**options)
        self._id_file = id_file
        self._wandb_init.pop("anonymous")  # of which wandb warns, whatever its value
        self.batch_size, self.with_weights = batch_size, log_model
        self._sent: dict[int, set[str]] | None = (
            None  # by step, the keys that W&B had at this start; None: not known yet
        )
        self._sent_before = 0  # the step before which W&B had everything
        self._latest: dict[str, Any] = {}  # its newest values

    @property
    def version(self) -> str:
        """The run's id, made or read when it is first needed: by then the folder is the run's, and holds no other one's."""
        if self._id is None:
            self._id = _identifier(self._id_file)
        return super().version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is not None:
            return self._experiment
        import wandb

        if wandb.run is not None:  # of a sweep's job that failed: wandb would go on with it
            wandb.run.finish(exit_code=1)
        self._wandb_init["id"] = self.version
        run = super().experiment
        run.define_metric("nimg")
        run.define_metric("*", step_metric="nimg", step_sync=True, overwrite=True)
        return run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """The resolved config. A group that W&B's own sweep chose (method=sfd) keeps that name; its options get another."""
        chosen = {key: value for key, value in self.experiment.config.items() if not isinstance(value, dict)}
        super().log_hyperparams(
            {f"{k}_options" if isinstance(v, dict) and k in chosen else k: v for k, v in params.items()}
        )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Lightning numbers a batch from 0; nimg counts the images of that batch too."""
        if step is None:
            raise ValueError("W&B: a metric needs the step it belongs to")
        self._catch_up(step)
        self._send(metrics, step)

    def _send(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log what W&B does not have yet."""
        there = {"epoch", *self._sent.get(step, ())}  # our loaders have a single, endless epoch
        if step == self._sent_before:  # of which a part may have come
            there.update(key for key, value in metrics.items() if self._latest.get(key) == value)
        row = {key: value for key, value in metrics.items() if key not in there}
        if row and step >= self._sent_before:
            self._log(row, step)

    def _log(self, row: Mapping[str, Any], step: int) -> None:
        super().log_metrics(row | {"nimg": (step + 1) * self.batch_size}, step)

    def _catch_up(self, end: int) -> None:
        """At the first row of this start, find what W&B has, and send what it lacks of the steps up to and with `end`.

        With `end`, since a run that is resumed in a validation does not log the rest of its step again.
        """
        if self._sent is not None:
            return
        folder, self._sent = Path(self.save_dir), {}
        for path in folder.glob(f"wandb/offline-run-*-{self.version}/run-*.wandb"):
            if path.parent.resolve() != Path(self.experiment.dir).parent.resolve():
                for row in read_wandb_rows(path):
                    self._sent.setdefault(row.get("trainer/global_step", -1), set()).update(row)
        self._latest = dict(self.experiment.summary)
        self._sent_before = int(self._latest.get("nimg", 0)) // self.batch_size - 1
        table = folder / "metrics.csv"
        for row in read_metrics_csv(table) if table.is_file() else []:
            step = int(row.pop("step")) - 1
            if step <= end:
                values = {key: float(value) for key, value in row.items() if value and key != "nimg"}
                self._send(values, step)
                self._sent.setdefault(step, set()).update(values)

    @rank_zero_only
    def log_final(
        self, records: Sequence[Record], folder: Path, step: int, convergence: list[list[str]] | None
    ) -> None:
        """Log what a complete run's folder holds: values, tables, images, and with `log_model` the student.

        Args:
            records: of the final evaluation.
            folder: the run's.
            step: the last one, as Lightning numbers it.
            convergence: header and body of a table, or None.
        """
        import wandb

        self._catch_up(step)
        row: dict[str, Any] = {"final/metrics": wandb.Table(columns=_COLUMNS, data=[_cells(r) for r in records])}
        if convergence:
            header, *body = convergence
            row["final/convergence"] = wandb.Table(columns=header, data=body)
        row |= {
            f"final/{name}": wandb.Image(str(folder / f"{name}.png"))
            for name in _PICTURES
            if (folder / f"{name}.png").is_file()
        }
        self._log(row, step)
        self.experiment.summary.update({final_metric_name(record): record.mean for record in records})
        if self.with_weights:
            self._log_student(folder)

    def _log_student(self, folder: Path) -> None:
        import wandb

        from stillhouse.checkpoints.weights import read_card

        path = folder / "student.safetensors"
        # The id keeps apart runs of one name in other folders, and long names that begin alike.
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', folder.resolve().name)[:100]}-{self.version}"
        artifact = wandb.Artifact(name, type="model", metadata=read_card(path))
        # The file itself, not a copy elsewhere: so an offline run's folder is all that has to be kept.
        artifact.add_file(str(path.resolve()), path.name, policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact, aliases=["latest"])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run where training failed; after success the final evaluation follows."""
        if status != "success":
            self.close(failed=True)

    @rank_zero_only
    def close(self, failed: bool = False) -> None:
        """End the run: wandb knows one per process, and the next job of a sweep would otherwise continue it."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None


def final_metric_name(record: Record) -> str:
    """Such as fid_digits_2k/student@1: metric with its number of samples, subject, and NFE (none for real images)."""
    metric = metric_with_count(record.metric, record.fingerprint["num_samples"])
    return f"{metric}/{record.subject}" + (f"@{record.nfe}" if record.nfe else "")


def _cells(record: Record) -> list[Any]:
    how = (record.weights, record.nfe, record.mean, record.std, record.images_per_second)
    return [record.metric, record.subject, record.name, *how, record.comparable_id]


def wandb_logger(
    folder: str,
    project: str,
    batch_size: int,
    *,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    notes: str | None = None,
    log_model: bool = False,
    offline: bool = False,
) -> WandbRun:
    """The logger of the run in `folder`, named like it.

    Its id is kept in folder/wandb_id, but that of W&B's own agent (WANDB_RUN_ID) wins. Offline runs lie in folder/wandb and
    can be sent later by `wandb sync`, all of them: a resumed run begins a new one with what the earlier ones lack.

    Args:
        folder: of the run.
        project: of W&B.
        batch_size: the global one.
        entity: user or team; None: W&B's default.
        group: None: the run's name without the seed, so that its seeds are one group.
        tags: words.
        notes: a sentence on the run.
        log_model: whether the evaluated student is kept as an artifact.
        offline: whether nothing is sent.

    Raises:
        ValueError: for empty names or tags.
    """
    for option, value in (("project", project), ("entity", entity), ("group", group), ("notes", notes)):
        if value is not None and not value.strip():
            raise ValueError(f"logger.wandb.{option} must not be empty")
    if not all(tags):
        raise ValueError(f"logger.wandb.tags must be a list of words, such as [paper,table2], got {tags!r}")
    name = Path(folder).name
    return WandbRun(
        batch_size=batch_size,
        log_model=log_model,
        project=project,
        entity=entity,
        name=name,
        group=group or re.sub(r"-seed\d+(?=-|$)", "", name),
        tags=list(dict.fromkeys(tags)),
        notes=notes,
        id_file=Path(folder) / "wandb_id",
        save_dir=folder,
        offline=offline,
    )


def _identifier(path: Path) -> str:
    known = path.read_text().strip() if path.exists() else ""
    identifier = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    if identifier != known:
        write_file(path, identifier.encode())
    return identifier
