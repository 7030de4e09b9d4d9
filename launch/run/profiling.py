"""trainer.profile: where a run's time goes, in files of its folder."""

from pathlib import Path

import torch
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from stillhouse.checks import check_choice

PROFILES = ("simple", "advanced", "torch")
_SKIPPED, _RECORDED = 3, 5  # training steps


def profiler(profile: str | None, folder: Path) -> Profiler | None:
    """Its files appear in folder/profile when training ends.

    simple: seconds by Lightning's actions (fit-simple.txt). advanced: by Python functions in each of these (fit-advanced.txt).
    torch: operators and, on a GPU, kernels of five training steps (fit-torch.txt), and their trace for chrome://tracing.

    Raises:
        ValueError: For another name.
    """
    if profile is None:
        return None
    check_choice("trainer.profile", profile, PROFILES)
    place = {"dirpath": folder / "profile", "filename": profile}
    if profile == "simple":
        return SimpleProfiler(**place, extended=True)
    if profile == "advanced":
        return AdvancedProfiler(**place)
    # Without a limit it would write a trace of every five steps; hooks for modules' names would end compilation.
    schedule = torch.profiler.schedule(wait=_SKIPPED - 1, warmup=1, active=_RECORDED, repeat=1)
    return PyTorchProfiler(**place, schedule=schedule, record_module_names=False)
