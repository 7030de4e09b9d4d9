"""Weights & Biases with a run id kept in the run folder, so that a resumed run continues its own curves."""

import secrets
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from metrics.files import write_file


class _OneRun(WandbLogger):
    """Ends its run with the training: wandb keeps one run per process, which the next job of a sweep would go on with."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)


def wandb_logger(folder: str, project: str, offline: bool = False, **options: Any) -> WandbLogger:
    """A WandbLogger for the run in `folder`; further options go to `wandb.init`.

    Offline runs lie in folder/wandb and can be sent later by `wandb sync`. The teacher and checkpoints are never uploaded.
    """
    path = Path(folder) / "wandb_id"
    if not path.exists():
        write_file(path, secrets.token_hex(4).encode())
    name = Path(folder).name
    identifier = path.read_text().strip()
    return _OneRun(
        project=project, name=name, id=identifier, save_dir=folder, offline=offline, resume="allow", **options
    )
