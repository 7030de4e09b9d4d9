"""Measure runs or a teacher: samples of fixed seeds -> metrics, a table, JSON and pictures; compare runs' convergence.

python evaluate.py run=runs/NAME; python evaluate.py 'run=[runs/A,runs/B*]'; python evaluate.py teacher=digits
python evaluate.py 'run=[runs/*]' report=report.html: one page of what the runs' folders hold; nothing is measured.
With 'steps=[1,2,4,8]' a student or a teacher is measured at several numbers of steps: quality against NFE.
python evaluate.py 'flows=[digits_rf1,digits_rf2]' data=digits: what errors add up to along a chain of flows.
"""

from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf

from launch.command_line import check_choices, follow_teacher, run, typed_options
from launch.run.names import register_resolvers
from launch.signals import stoppable

PICTURES = ("samples.png", "interpolation.png", "quality.png")


class Measured(NamedTuple):
    """Records and what they were made with. folder: where they belong. export: writes a run's student for elsewhere."""

    records: list
    evaluation: Any
    samplers: dict[str, Any]
    folder: Path
    export: Callable[[], None] | None = None


def run_folders(patterns: Sequence[str], option: str = "run") -> list[Path]:
    """The run folders that the patterns name, each once, in order; FileNotFoundError for a pattern that names none."""
    folders: dict[Path, None] = {}
    for pattern in patterns:
        found = [Path(path) for path in sorted(glob(pattern)) if (Path(path) / "config.yaml").is_file()]
        if not found:
            raise FileNotFoundError(
                f"{option}={pattern} names no run (a folder with the config.yaml that train.py writes)"
            )
        folders.update(dict.fromkeys(found))
    return list(folders)


def asked_steps(cfg: DictConfig) -> list[int]:
    """The numbers of steps in `steps`, each once; none: each subject's own."""
    if cfg.steps is None:
        return []
    steps = OmegaConf.to_container(cfg.steps) if OmegaConf.is_config(cfg.steps) else [cfg.steps]
    if not isinstance(steps, list) or not steps or not all(type(count) is int and count > 0 for count in steps):
        raise ValueError(f"steps={cfg.steps} must be whole numbers from 1 on, such as 'steps=[1,2,4]'")
    return list(dict.fromkeys(steps))


def named_path(cfg: DictConfig, option: str) -> Path:
    """The file or folder that an option names."""
    if type(cfg[option]) not in (str, int) or not str(cfg[option]):
        raise ValueError(f"{option}={cfg[option]} must be the name of a file or folder")
    return Path(str(cfg[option]))


def trained(cfg: DictConfig, path: Path, counts: Sequence[int] = ()) -> tuple[Any, DictConfig, Any, Any]:
    """A run's folder and config, its method with the trained student in place, and which weights it has.

    counts: numbers of steps of which the student takes the last one. Errors: ValueError for one that it can't take.
    """
    from launch import option_types
    from launch.evaluate.measure import choose_steps, load_student
    from launch.run.build import build_seeded
    from launch.run.folder import RunFolder
    from launch.run.remote_files import fetch

    folder = RunFolder(path)
    stored = folder.read_config()
    if lacking := [part for part in ("method", "data", "evaluation", "seed") if part not in stored]:
        raise ValueError(f"{folder.config} lacks {', '.join(lacking)}; restore or remove it")
    for part in (stored.method, stored.data, stored.evaluation):
        option_types.check_targets(part)  # before any of them is built
    if cfg.download:
        fetch(OmegaConf.to_container(stored))
    method = build_seeded(stored.method, stored.seed)
    weights = load_student(method, folder, cfg.weights, cfg.checkpoint)
    for count in counts:
        weights = choose_steps(method, folder, count, weights)
    return folder, stored, method, weights


def measurable(cfg: DictConfig, folders: Sequence[Path], counts: Sequence[int]) -> list[tuple[Path, list[int]]]:
    """The runs that can be measured, each with those of the `counts` that it can take; what can't be is said in a line each.

    Errors: ValueError where nothing can be.
    """
    from launch.errors import EXPECTED
    from launch.evaluate.measure import checked
    from launch.run.build import build

    found, lines = [], []
    for path in folders:
        try:
            folder, stored, method, _ = trained(cfg, path)
            checked(settings(cfg, stored), build(stored.data))
        except EXPECTED as error:
            lines.append(about(path, error))
            continue
        possible = []
        for count in counts:
            try:
                method.choose_steps(count, folder.path)
                possible.append(count)
            except ValueError as error:
                lines.append(about(path, error))
        if possible or not counts:
            found.append((path, possible))
    if not found:
        raise ValueError("; ".join(lines))
    for line in lines:
        print(f"not measured: {line}", flush=True)
    return found


def about(path: Path, error: Exception) -> str:
    """An error's line, with the run that it is about."""
    from launch.errors import one_line

    line = one_line(error)
    return line if str(path) in line else f"{path}: {line}"


def evaluate_runs(cfg: DictConfig, folders: Sequence[Path], device: Any) -> Iterator[Measured]:
    """Each run that can be measured. Errors: ValueError where none can be."""
    from launch.errors import EXPECTED

    counts = asked_steps(cfg)
    alone = len(folders) == 1 and len(counts) < 2
    runs = [(folders[0], counts)] if alone else measurable(cfg, folders, counts)
    for path, possible in runs:
        try:
            measured = evaluate_run(cfg, path, possible, device)
        except EXPECTED as error:
            if len(runs) == 1:
                raise
            print(f"not measured: {about(path, error)}", flush=True)
            continue
        yield measured


def evaluate_run(cfg: DictConfig, path: Path, counts: list[int], device: Any) -> Measured:
    from launch.evaluate.measure import Evaluation, samplers
    from launch.run.build import build

    folder, stored, method, weights = trained(cfg, path, counts)
    data = build(stored.data)
    student = None
    if cfg.export is not None:
        from launch.evaluate.export import export, portable

        student = portable(method, stored, data.num_classes)  # what can't be exported is refused before it is measured
        target = named_path(cfg, "export")
    evaluation = Evaluation(settings(cfg, stored), data, device)
    records = evaluation.run(method.to(device), folder, weights, counts)

    def leave() -> None:
        export(target, student, method, folder, weights.name, records)
        print(f"{target} written", flush=True)

    leaves = None if student is None else leave
    return Measured(records, evaluation, samplers(method, folder, counts), path / "evaluation", leaves)


def evaluate_teacher(cfg: DictConfig, device: Any) -> Measured:
    from launch.evaluate.measure import Evaluation
    from launch.run.build import build, build_seeded

    steps = asked_steps(cfg) or [None]
    data, teacher = build(cfg.data), build_seeded(cfg.teacher, cfg.seed)
    evaluation = Evaluation(settings(cfg), data, device)
    records = [record for count in steps for record in evaluation.teacher(teacher, count)]
    records += evaluation.real()
    return Measured(records, evaluation, {"teacher": teacher.sample}, teacher_folder(cfg))


def teacher_folder(cfg: DictConfig) -> Path:
    return Path("runs") / f"teacher-{cfg.teacher.name}"


def check_teacher(cfg: DictConfig, device: Any) -> None:
    from launch.evaluate.self_test import check
    from launch.run.build import build, build_seeded

    teacher = build_seeded(cfg.teacher, cfg.seed)
    print(f"\n{check(teacher, build(cfg.data), teacher_folder(cfg), device)}")


def evaluate_flows(cfg: DictConfig, device: Any) -> None:
    from datamodules.trajectories import check_alike
    from launch.evaluate.flow_paths import draw_flow_paths, planar
    from launch.evaluate.flows import FlowMeasurement, Run, place, report
    from launch.evaluate.measure import Evaluation
    from launch.evaluate.tasks import listed
    from launch.run.build import build, build_seeded
    from launch.run.teachers import teacher_config
    from stillhouse.checks import check_counts
    from stillhouse.files import check_writable

    if "data" not in cfg:
        raise ValueError("flows are measured on a data set; add data=NAME")
    steps = asked_steps(cfg) or [1]
    check_counts(2, flow_samples=cfg.flow_samples)
    check_counts(path_steps=cfg.path_steps)
    cfg.flows = [teacher_config(name, "flows") for name in listed(cfg.flows, "flows")]
    flows, data = [build_seeded(flow, cfg.seed) for flow in cfg.flows], build(cfg.data)
    check_alike(flows, "flows")

    def read(path: Path) -> Run:
        folder, stored, method, weights = trained(cfg, path)
        return Run(folder, OmegaConf.to_container(stored), method, weights)

    paths = [] if cfg.distilled is None else run_folders(listed(cfg.distilled, "distilled"), "distilled")
    for path in paths:
        place(flows, read(path))  # refuses one of another chain before the flows are measured
    folder = named_path(cfg, "flows_folder")
    for name in ("flows.json", "flows.png", "paths.png"):
        check_writable(folder / name)
    evaluation = Evaluation(settings(cfg), data, device)
    measurement = FlowMeasurement(flows, evaluation, samples=cfg.flow_samples, path_steps=cfg.path_steps)
    print(f"\n{report(measurement.run(steps, map(read, paths)), folder)}")
    if planar(evaluation.shape):
        students = (read(path).method.to(device) for path in paths)
        draw_flow_paths(folder / "paths.png", flows, students, evaluation, cfg.path_steps)
        print(f"{folder}/paths.png written")


def settings(cfg: DictConfig, stored: DictConfig | None = None) -> dict[str, Any]:
    """How to measure: as the command says, else as a run's config does. Errors: ValueError for evaluation=none."""
    from launch.evaluate.measure import measures_nothing
    from launch.run.build import build

    chosen = build(cfg.evaluation if "evaluation" in cfg else stored.evaluation) | overrides(cfg)
    if measures_nothing(chosen):
        way_out = (
            "choose another one" if stored is None else "it was trained so; choose another one by +evaluation=pixels"
        )
        raise ValueError(f"evaluation=none measures nothing: {way_out}")
    return chosen


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


def check_targets(cfg: DictConfig, folders: Sequence[Path]) -> None:
    """Refuse before anything is measured what could not be written after it. Errors: ValueError, OSError."""
    from launch.evaluate.export import check_target
    from stillhouse.files import check_writable

    names = ["check.json", "check.png"] if cfg.check else ["metrics.json", *PICTURES]
    targets = [folder / "evaluation" for folder in folders] or [teacher_folder(cfg)]
    files = [target / name for target in targets for name in names]
    if len(folders) > 1 and cfg.comparison is not None:
        kinds = [f"{name}.{kind}" for name in ("convergence", "quality") for kind in ("json", "png")]
        files += [named_path(cfg, "comparison") / name for name in kinds]
    for file in files:
        check_writable(file)
    if cfg.export is not None:
        if len(asked_steps(cfg)) > 1:
            raise ValueError("export is for the student of one run, at one number of steps")
        check_target(named_path(cfg, "export"))


def keep(measured: Measured) -> None:
    """Write what was measured, with pictures, into its folder, beside what is there of other measurements."""
    from launch.evaluate import quality
    from stillhouse.metrics.records import load_records, merge_records, save_records

    path = measured.folder / "metrics.json"
    stored = load_records(path) if path.exists() else []
    save_records(path, merge_records(stored, measured.records))
    measured.evaluation.pictures(measured.folder, measured.samplers)
    quality.draw_measured(measured.folder / "quality.png", measured.records)
    print(f"{path} written", flush=True)
    if measured.export is not None:
        measured.export()


def measure_all(cfg: DictConfig, folders: Sequence[Path], device: Any) -> list:
    """All records, kept and printed: also those before an error, in measuring or writing, ended the rest."""
    from stillhouse.analysis.tables import records_text
    from stillhouse.metrics.records import merge_records

    shown: list = []
    try:
        for measured in evaluate_runs(cfg, folders, device) if folders else [evaluate_teacher(cfg, device)]:
            shown = merge_records(shown, measured.records)
            keep(measured)
    finally:
        if shown:
            print(f"\n{records_text(shown)}", flush=True)
    if not shown:
        raise ValueError("nothing was measured; the lines above say why")
    return shown


def compare_all(cfg: DictConfig, folders: Sequence[Path], shown: list) -> None:
    from launch.evaluate import convergence, quality

    students = [record for record in shown if record.subject == "student"]
    if len({record.nfe for record in students}) > 1:
        print(f"\n{quality.report(folders, named_path(cfg, 'comparison'), like=students[0], weights=cfg.weights)}")
    print(f"\n{convergence.report(folders, named_path(cfg, 'comparison'), weights=cfg.weights)}")


def evaluate(cfg: DictConfig, chosen: Sequence[str]) -> None:
    """chosen: the options of the command line."""
    from launch.evaluate.tasks import check_used, chosen_task, listed

    patterns = [] if cfg.run is None else listed(cfg.run, "run")
    folders = run_folders(patterns) if cfg.report is None else []
    check_used(chosen_task(cfg, len(folders)), cfg, chosen)
    if cfg.report is not None:
        from launch.evaluate.report import write_report

        print(write_report(named_path(cfg, "report"), patterns))
        return
    from launch.options import check_measurement

    check_measurement(cfg)
    device = chosen_device(cfg.device)
    if cfg.teacher:
        if "data" not in cfg:
            raise ValueError(f"teacher={cfg.teacher.name} is not named like its data set; add data=NAME")
        if cfg.solver is not None:
            cfg.teacher.solver = cfg.solver
    if cfg.flows is None:
        check_targets(cfg, folders)
    if cfg.download:
        from launch.run.remote_files import fetch

        fetch(OmegaConf.to_container(cfg, resolve=True))
    if cfg.check:
        check_teacher(cfg, device)
    elif cfg.flows is not None:
        evaluate_flows(cfg, device)
    else:
        shown = measure_all(cfg, folders, device)
        if len(folders) > 1 and cfg.comparison is not None:
            compare_all(cfg, folders, shown)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from launch.errors import reported

    with reported("evaluate"):
        check_choices()
        evaluate(cfg, typed_options())


if __name__ == "__main__":
    register_resolvers()
    follow_teacher()
    with stoppable("evaluate"):
        run(main)
