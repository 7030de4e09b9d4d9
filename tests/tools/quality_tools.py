"""Measured runs and teachers whose numbers are known by hand, as folders."""

from pathlib import Path

from omegaconf import OmegaConf

from stillhouse.metrics.records import Record, save_records

FINGERPRINT = {"extractor_hash": "e" * 64, "num_samples": 2000, "seeds": [0, 5999]}


def measured(
    subject, nfe, mean, *, name="run", weights=None, metric="fid_digits", solver=None, std=0.02, **fingerprint
):
    how = FINGERPRINT | fingerprint | {"weights": weights or ("ema" if subject == "student" else None)}
    return Record(name, metric, subject, nfe, mean, std, [mean], None, how, solver=solver)


def students(values, **options):
    """Records of a student from {NFE: mean}."""
    return [measured("student", nfe, mean, **options) for nfe, mean in values.items()]


def teachers(values, solver="heun", **options):
    return [measured("teacher", nfe, mean, name="digits", solver=solver, **options) for nfe, mean in values.items()]


REAL = measured("real", 0, 0.1, name="digits")


def write_measured(folder: Path, final, again=(), *, method="sfd", seed=0, **options) -> Path:
    """A complete run's folder: its final records, those of evaluate.py and its config, with `options` of the method."""
    settings = {"name": folder.name, "folder": f"runs/{folder.name}", "seed": seed}
    folder.mkdir(parents=True)
    OmegaConf.save(settings | {"method": {"name": method, "seed": seed, **options}}, folder / "config.yaml")
    save_records(folder / "metrics.json", final)
    if again:
        save_records(folder / "evaluation/metrics.json", again)
    return folder
