"""Measure runs or a teacher: samples of fixed seeds -> metrics, a table, JSON and pictures; compare runs' convergence.

python evaluate.py run=runs/NAME; python evaluate.py 'run=[runs/A,runs/B*]'; python evaluate.py teacher=digits
"""

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf


def run_folders(patterns: str | Sequence[str]) -> list[Path]:
    """The run folders that the patterns name, each once, in order; FileNotFoundError for a pattern that names none."""
    folders: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [Path(path) for path in sorted(glob(str(pattern))) if (Path(path) / "config.yaml").is_file()]
        if not found:
            raise FileNotFoundError(f"run={pattern} names no run (a folder with the config.yaml that train.py writes)")
        folders.update(dict.fromkeys(found))
    return list(folders)


def evaluate_run(cfg: DictConfig, path: Path, device: Any) -> tuple[list, Any, dict, Path]:
    from launch.build import build, build_seeded
    from launch.folder import RunFolder
    from launch.measure import Evaluation, load_student, samplers

    folder = RunFolder(path)
    stored = folder.read_config()
    data, method = build(stored.data), build_seeded(stored.method, stored.seed)
    weights = load_student(method, folder, cfg.weights, cfg.checkpoint)
    evaluation = Evaluation(build(stored.evaluation) | overrides(cfg), data, device)
    records = evaluation.run(method.to(device), folder.name, weights)
    return records, evaluation, samplers(method), path / "evaluation"


def evaluate_teacher(cfg: DictConfig, device: Any) -> tuple[list, Any, dict, Path]:
    from launch.build import build, build_seeded
    from launch.measure import Evaluation

    if "data" not in cfg:
        raise ValueError(f"teacher={cfg.teacher.name} is not named like its data set; add data=NAME")
    if cfg.solver is not None:
        cfg.teacher.solver = cfg.solver
    data, teacher = build(cfg.data), build_seeded(cfg.teacher, cfg.seed)
    evaluation = Evaluation(build(cfg.evaluation) | overrides(cfg), data, device)
    steps = OmegaConf.to_container(cfg.steps) if OmegaConf.is_list(cfg.steps) else [cfg.steps]
    records = [record for count in steps for record in evaluation.teacher(teacher, count)]
    records += evaluation.real()
    return records, evaluation, {"teacher": teacher.sample}, Path("runs") / f"teacher-{teacher.name}"


def overrides(cfg: DictConfig) -> dict[str, Any]:
    """The evaluation's settings that the command line changes."""
    chosen = {key: cfg[key] for key in ("num_samples", "blocks", "metrics") if cfg[key] is not None}
    return OmegaConf.to_container(OmegaConf.create(chosen))


def chosen_device(name: str) -> Any:
    """The torch.device that `device=NAME` asks for; ValueError where this machine has none."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} can't be used here ({error}); choose cpu, cuda or auto") from error


def evaluate(cfg: DictConfig) -> None:
    from launch.compare import report
    from metrics.records import load_records, merge_records, save_records
    from metrics.tables import table

    device = chosen_device(cfg.device)
    if (cfg.run is None) == ("name" not in (cfg.teacher or {})):
        raise ValueError("say what to measure: run=runs/NAME (or a list, or a pattern) or teacher=NAME, one of the two")
    if cfg.run is not None and (cfg.steps is not None or cfg.solver is not None):
        raise ValueError("steps and solver are for teacher=NAME; a run is sampled as its method says")
    folders = [] if cfg.run is None else run_folders(cfg.run)
    results = (evaluate_run(cfg, path, device) for path in folders) if folders else [evaluate_teacher(cfg, device)]
    shown: list = []
    for records, evaluation, samplers, folder in results:
        path = folder / "metrics.json"
        stored = load_records(path) if path.exists() else []
        save_records(path, merge_records(stored, records))
        evaluation.pictures(folder, samplers)
        shown = merge_records(shown, records)
        print(f"{path} written", flush=True)
    print(f"\n{table(shown)}")
    if len(folders) > 1 and cfg.comparison is not None:
        print(f"\n{report(folders, Path(cfg.comparison), weights=cfg.weights)}")


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from launch.errors import reported

    with reported("evaluate"):
        evaluate(cfg)


if __name__ == "__main__":
    main()
