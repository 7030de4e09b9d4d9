"""Measure runs or a teacher: samples of fixed seeds -> metrics, a table, JSON and pictures; compare runs' convergence.

python evaluate.py run=runs/NAME; python evaluate.py 'run=[runs/A,runs/B*]'; python evaluate.py teacher=digits
python evaluate.py 'run=[runs/*]' report=report.html: one page of what the runs' folders hold; nothing is measured.
With 'steps=[1,2,4,8]' a student or a teacher is measured at several numbers of steps: quality against NFE.
python evaluate.py 'flows=[digits_rf1,digits_rf2]' data=digits: what errors add up to along a chain of flows.
"""

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from launch.command_line import check_choices, run
from launch.names import register_resolvers
from launch.notice import stoppable


def run_folders(patterns: str | Sequence[str], option: str = "run") -> list[Path]:
    """The run folders that the patterns name, each once, in order; FileNotFoundError for a pattern that names none."""
    folders: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [Path(path) for path in sorted(glob(str(pattern))) if (Path(path) / "config.yaml").is_file()]
        if not found:
            raise FileNotFoundError(
                f"{option}={pattern} names no run (a folder with the config.yaml that train.py writes)"
            )
        folders.update(dict.fromkeys(found))
    return list(folders)


def student_steps(cfg: DictConfig) -> list[int]:
    """The numbers of steps that `steps` asks of students, each once; none: as their methods say."""
    if cfg.steps is None:
        return []
    steps = OmegaConf.to_container(cfg.steps) if OmegaConf.is_list(cfg.steps) else [cfg.steps]
    if not steps or not all(type(count) is int and count > 0 for count in steps):
        raise ValueError(f"steps={cfg.steps} must be whole numbers from 1 on, such as 'steps=[1,2,4]'")
    return list(dict.fromkeys(steps))


def trained(cfg: DictConfig, path: Path, counts: list[int]) -> tuple[Any, DictConfig, Any, str]:
    """A run's folder and config, its method with the trained student in place, and the name of the weights.

    Every number of steps is chosen once: an impossible one is refused before the others are measured.
    """
    from launch.build import build_seeded
    from launch.folder import RunFolder
    from launch.measure import choose_steps, load_student
    from launch.sources import fetch

    folder = RunFolder(path)
    stored = folder.read_config()
    if cfg.download:
        fetch(OmegaConf.to_container(stored, resolve=True))
    method = build_seeded(stored.method, stored.seed)
    weights = load_student(method, folder, cfg.weights, cfg.checkpoint)
    for count in counts:
        weights = choose_steps(method, folder, count, weights)
    return folder, stored, method, weights


def check_export(cfg: DictConfig) -> None:
    from launch.export import check_target

    if cfg.run is None or len(run_folders(cfg.run)) != 1 or len(student_steps(cfg)) > 1:
        raise ValueError("export is for the student of one run, at one number of steps: say run=runs/NAME")
    check_target(cfg.export)


def evaluate_run(cfg: DictConfig, path: Path, counts: list[int], device: Any) -> tuple[list, Any, dict, Path]:
    from launch.build import build
    from launch.measure import Evaluation, samplers

    folder, stored, method, weights = trained(cfg, path, counts)
    data = build(stored.data)
    student = None
    if cfg.export is not None:
        from launch.export import export, portable

        student = portable(method, stored, data.num_classes)  # what can't be exported is refused before it is measured
    evaluation = Evaluation(build(stored.evaluation) | overrides(cfg), data, device)
    records = evaluation.run(method.to(device), folder, weights, counts)
    if student is not None:
        export(cfg.export, student, method, folder, weights, records)
        print(f"{cfg.export} written", flush=True)
    return records, evaluation, samplers(method, folder, counts), path / "evaluation"


def evaluate_teacher(cfg: DictConfig, device: Any) -> tuple[list, Any, dict, Path]:
    from launch.build import build, build_seeded
    from launch.measure import Evaluation

    data, teacher = build(cfg.data), build_seeded(cfg.teacher, cfg.seed)
    evaluation = Evaluation(build(cfg.evaluation) | overrides(cfg), data, device)
    steps = OmegaConf.to_container(cfg.steps) if OmegaConf.is_list(cfg.steps) else [cfg.steps]
    records = [record for count in steps for record in evaluation.teacher(teacher, count)]
    records += evaluation.real()
    return records, evaluation, {"teacher": teacher.sample}, Path("runs") / f"teacher-{teacher.name}"


def check_teacher(cfg: DictConfig, device: Any) -> None:
    from launch.build import build, build_seeded
    from launch.check import check

    teacher = build_seeded(cfg.teacher, cfg.seed)
    print(f"\n{check(teacher, build(cfg.data), Path('runs') / f'teacher-{teacher.name}', device)}")


def evaluate_flows(cfg: DictConfig, device: Any) -> None:
    from datamodules.trajectories import check_alike
    from launch.build import build, build_seeded
    from launch.flow_paths import draw_flow_paths, planar
    from launch.flows import FlowMeasurement, Run, place, report
    from launch.measure import Evaluation
    from launch.teachers import teacher_config
    from networks.checks import check_counts

    if "data" not in cfg:
        raise ValueError("flows are measured on a data set; add data=NAME")
    steps = student_steps(cfg) or [1]
    check_counts(2, flow_samples=cfg.flow_samples)
    check_counts(path_steps=cfg.path_steps)
    cfg.flows = [
        teacher_config(str(name), "flows") for name in ([cfg.flows] if isinstance(cfg.flows, str) else cfg.flows)
    ]
    flows, data = [build_seeded(flow, cfg.seed) for flow in cfg.flows], build(cfg.data)
    check_alike(flows, "flows")

    def read(path: Path) -> Run:
        folder, stored, method, weights = trained(cfg, path, [])
        return Run(folder, OmegaConf.to_container(stored, resolve=True), method, weights)

    paths = [] if cfg.distilled is None else run_folders(cfg.distilled, "distilled")
    for path in paths:
        place(flows, read(path))  # refuses one of another chain before the flows are measured
    evaluation = Evaluation(build(cfg.evaluation) | overrides(cfg), data, device)
    measurement = FlowMeasurement(flows, evaluation, samples=cfg.flow_samples, path_steps=cfg.path_steps)
    folder = Path(cfg.flows_folder)
    print(f"\n{report(measurement.run(steps, map(read, paths)), folder)}")
    if planar(evaluation.shape):
        students = (read(path).method.to(device) for path in paths)
        draw_flow_paths(folder / "paths.png", flows, students, evaluation, cfg.path_steps)
        print(f"{folder}/paths.png written")


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


def report(cfg: DictConfig) -> None:
    from launch.report import write_report

    odd = [key for key in ("flows", "distilled", "export", "steps", "solver", "checkpoint") if cfg[key] is not None]
    if cfg.run is None or "name" in (cfg.teacher or {}) or odd or cfg.check:
        extra = f", without {', '.join(odd)}" if odd else ""
        raise ValueError(f"a report is made of runs that are measured already: say 'run=[runs/*]' report=...{extra}")
    patterns = OmegaConf.to_container(cfg.run) if OmegaConf.is_list(cfg.run) else [cfg.run]
    print(write_report(Path(str(cfg.report)), patterns))


def evaluate(cfg: DictConfig) -> None:
    if cfg.report is not None:
        return report(cfg)
    from launch import compare, quality
    from launch.sources import fetch
    from metrics.records import load_records, merge_records, save_records
    from metrics.tables import table

    device = chosen_device(cfg.device)
    teacher = "name" in (cfg.teacher or {})
    if (cfg.run is not None) + teacher + (cfg.flows is not None) != 1:
        raise ValueError(
            "say what to measure: run=runs/NAME (or a list, or a pattern), teacher=NAME or 'flows=[NAME,NAME]', one of them"
        )
    if not teacher and cfg.solver is not None:
        raise ValueError("solver is for teacher=NAME; runs and flows are sampled as their configs say")
    if teacher:
        if "data" not in cfg:
            raise ValueError(f"teacher={cfg.teacher.name} is not named like its data set; add data=NAME")
        if cfg.solver is not None:
            cfg.teacher.solver = cfg.solver
    elif cfg.check:
        raise ValueError("check=true is a teacher's self-test: say teacher=NAME")
    if cfg.export is not None:
        check_export(cfg)
    if cfg.download:
        fetch(OmegaConf.to_container(cfg, resolve=True))
    if cfg.check:
        return check_teacher(cfg, device)
    if cfg.flows is not None:
        return evaluate_flows(cfg, device)
    if cfg.distilled is not None:
        raise ValueError("distilled is for flows=[...], the chain that those runs were distilled from")
    folders = [] if cfg.run is None else run_folders(cfg.run)
    if folders:
        counts = student_steps(cfg)
        for path in folders[1:] if counts else []:
            trained(cfg, path, counts)  # refuses what the last run can't do before the first one is measured
        results = (evaluate_run(cfg, path, counts, device) for path in folders)
    else:
        results = [evaluate_teacher(cfg, device)]
    shown: list = []
    for records, evaluation, samplers, folder in results:
        path = folder / "metrics.json"
        stored = load_records(path) if path.exists() else []
        save_records(path, merge_records(stored, records))
        evaluation.pictures(folder, samplers)
        quality.draw_measured(folder / "quality.png", records)
        shown = merge_records(shown, records)
        print(f"{path} written", flush=True)
    print(f"\n{table(shown)}")
    students = [record for record in shown if record.subject == "student"]
    if len(folders) > 1 and cfg.comparison is not None:
        if len({record.nfe for record in students}) > 1:
            print(f"\n{quality.report(folders, Path(cfg.comparison), like=students[0], weights=cfg.weights)}")
        print(f"\n{compare.report(folders, Path(cfg.comparison), weights=cfg.weights)}")


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from launch.errors import reported

    with reported("evaluate"):
        check_choices()
        evaluate(cfg)


if __name__ == "__main__":
    register_resolvers()
    with stoppable("evaluate"):
        run(main)
