"""Weights & Biases with a run id kept in the run folder, so that a resumed run continues its own curves."""

import os
import secrets
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger


def wandb_logger(folder: str, project: str, offline: bool = False, **options: Any) -> WandbLogger:
    """A WandbLogger for the run in `folder`; further options go to `wandb.init`.

    Offline runs lie in folder/wandb and can be sent later by `wandb sync`. The teacher and checkpoints are never uploaded.
    """
    path = Path(folder) / "wandb_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"wandb_id.{os.getpid()}.tmp")
        temporary.write_text(secrets.token_hex(4))
        os.replace(temporary, path)
    name = Path(folder).name
    identifier = path.read_text().strip()
    return WandbLogger(
        project=project, name=name, id=identifier, save_dir=folder, offline=offline, resume="allow", **options
    )
