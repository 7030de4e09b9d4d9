"""Teachers of a run: those of conf/teacher, students of other runs, and lists of both in `method.teachers`."""

from collections.abc import Mapping
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError

from launch.run.folder import RunFolder
from stillhouse.checkpoints.weights import read_card

PRETRAIN = "train one by `python train.py method=pretrain data=...` (a flow: method=rectified_flow), then say teacher=runs/NAME"


# Of any teacher's config; without a value they are left out of it, so that it is that of a teacher from before they were.
GUIDANCE = ("guidance", "guidance_interval", "guide")


def expand_guide(cfg: DictConfig) -> None:
    """Replace, in place, the name in `teacher.guide` by that teacher's config, and leave out options of no guidance.

    Raises:
        ValueError, FileNotFoundError: As `teacher_config`.
    """
    teacher = cfg.get("teacher")
    if not OmegaConf.is_dict(teacher):
        return
    with open_dict(cfg):
        for option in GUIDANCE:
            if option in teacher and teacher[option] is None:
                del teacher[option]
        if "guide" in teacher and not OmegaConf.is_dict(teacher.guide):
            teacher.guide = teacher_config(teacher.guide, "teacher.guide")


def expand_teachers(cfg: DictConfig) -> None:
    """Replace, in place, names of teachers by their configs: those in `method.teachers`, and `teacher.guide`.

    A name is that of a file in conf/teacher or of a run folder.

    Raises:
        ValueError: for a method without the teacher that it needs, a `teacher` that it would not see, a list of something else,
            a name that is neither, or a student that is no teacher.
        FileNotFoundError: for a run without a finished student.
    """
    expand_guide(cfg)
    if "teacher" in cfg.method and not _is_teacher(cfg):
        raise ValueError(
            f"method={cfg.method.name} needs a teacher, or the network of one, and conf/teacher has none that is named as the "
            f"data: say teacher=NAME (conf/teacher), or {PRETRAIN}"
        )
    names = cfg.method.get("teachers")
    if names is None:
        return
    if isinstance(names, str) or not OmegaConf.is_list(names):
        raise ValueError(f"method.teachers={names} must be a list, such as 'method.teachers=[digits_rf1,digits_rf2]'")
    teacher = cfg.get("teacher") or {}
    if "name" in teacher and "teacher" not in cfg.method:
        raise ValueError(f"teacher={cfg.teacher.name} has no effect here: name the teachers in method.teachers")
    changes = {} if "name" in teacher else teacher  # of any teacher: what trainer=debug makes smaller, and guidance
    with open_dict(cfg):
        cfg.method.teachers = [
            name if OmegaConf.is_dict(name) else _changed(teacher_config(name, "method.teachers"), changes)
            for name in names
        ]
        if changes:
            cfg.teacher = {}


def _changed(teacher: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    with open_dict(teacher):  # those of GUIDANCE are in no teacher's own config
        return OmegaConf.merge(teacher, changes)


def _is_teacher(cfg: DictConfig) -> bool:
    """Whether `method.teacher` describes one: conf/teacher/none.yaml does not, nor what a method changes of it."""
    try:
        teacher = cfg.method.teacher
    except InterpolationKeyError:  # of ~teacher
        return False
    return OmegaConf.is_dict(teacher) and "_target_" in teacher


def teacher_config(name: Any, option: str) -> DictConfig:
    """Return the config of a teacher.

    Args:
        name: Of a file in conf/teacher, or a run's folder.
        option: The option that gives the name, for the message.

    Raises:
        ValueError: For a name that is neither, or a student that is no teacher.
        FileNotFoundError: For a run without a finished student.
    """
    if isinstance(name, str) and "/" in name and not _is_group(f"teacher/{name.partition('/')[0]}"):
        _run_folder(option, "teacher", name)
    try:
        config = compose(config_name=f"teacher/{name}").get("teacher") if isinstance(name, str) and name else None
    except (MissingConfigException, ConfigCompositionException):
        config = None
    if not config:  # also conf/teacher/none.yaml
        raise ValueError(f"{option}: {name} is neither a file in conf/teacher nor a run folder; {PRETRAIN}")
    return config


def _is_group(path: str) -> bool:
    return GlobalHydra.instance().config_loader().repository.group_exists(path)


def from_run(group: str, name: str) -> dict[str, Any]:
    """The config that group=name adds where `name` is a run's folder: its student as `teacher`, or its `data` and `evaluation`.

    Raises:
        ValueError: for what is no run folder, a damaged config, and a student that can't be sampled by its teacher's solver.
        FileNotFoundError: for a run without a finished student.
    """
    folder = _run_folder(group, group, name)
    if group == "teacher":
        return {"teacher": _student(folder)}
    return {key: value for key, value in folder.plain_config().items() if key in ("data", "evaluation")}


def _run_folder(option: str, group: str, name: str) -> RunFolder:
    """Return the run's folder `name` that `option` gives in place of a file in conf/GROUP.

    Raises:
        ValueError: For what is no run folder.
    """
    folder = RunFolder(name)
    if not folder.config.is_file():
        raise ValueError(
            f"{option}={name}: there is no run (no {folder.config}); give a folder that train.py made, or a file in conf/{group}"
        )
    return folder


def _student(folder: RunFolder) -> dict[str, Any]:
    weights = folder.path / "student.safetensors"
    if not weights.is_file():
        way_out = "restore it" if folder.complete() else "finish that run first: the command that started it resumes it"
        raise FileNotFoundError(f"{folder.path} is no teacher yet, for it has no student.safetensors; {way_out}")
    config, card = students_teacher(folder.read_config()), read_card(weights)
    if card.get("two_times"):
        raise ValueError(
            f"the student of {folder.path} jumps between two times and is no teacher; take the one that it began with"
        )
    if card.get("sampling", {}).get("solver") == "renoising":
        config |= consistency_model(card["sampling"], card["preconditioning"])
    evaluations = [value["nfe"] for key, value in card.get("metrics", {}).items() if key.endswith("/student")]
    evaluations += [card["nfe"]] if "nfe" in card else []
    if evaluations and max(evaluations) < config.get("steps", 1):
        raise ValueError(
            f"the student of {folder.path} was distilled into {max(evaluations)} network evaluations and is no teacher to be "
            f"sampled in {config['steps']} steps; take a run of pretrain, rectified_flow or reflow"
        )
    if config["network"].get("label_dropout"):
        config["network"]["label_dropout"] = card.get("label_dropout", config["network"]["label_dropout"])
    config.pop("source", None)  # what the first teacher's weights were made of
    for option in GUIDANCE:  # a student of a guided teacher makes its images by itself
        config.pop(option, None)
    # The hash: a run trained anew under this name is another teacher, which a resumed run must not go on with.
    return config | {
        "name": folder.name,
        "weights": str(weights),
        "sha256": card["sha256"],
        "licence": card.get("licence", config.get("licence", "unknown")),
    }


def consistency_model(sampling: Mapping[str, Any], preconditioning: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher's config says where a consistency model is the teacher: one evaluation at the highest level makes a sample.

    Args:
        sampling: Of the student's card.
        preconditioning: Of the student's card.
    """
    options = dict(preconditioning)
    name = options.pop("name")
    return {
        "solver": sampling["solver"],
        "solver_options": sampling["options"],
        "steps": 1,
        "schedule": {
            "_target_": "stillhouse.diffusion.schedules.karras",
            "_partial_": True,
            "sigma_max": sampling["sigmas"][0],
        },
        "preconditioning": options | {"_target_": f"stillhouse.diffusion.preconditioning.{name}"},
    }


def students_teacher(stored: DictConfig) -> dict[str, Any]:
    """The config of the teacher that a run's student began as, hence that of the student's network, from the run's config."""
    several = stored.method.get("teachers") or [None]
    teacher = stored.method.get("teacher", several[-1])  # of several the last one
    if not OmegaConf.is_dict(teacher) or "network" not in teacher:
        raise ValueError("the config of this run has no method.teacher with a network; restore its config.yaml")
    return OmegaConf.to_container(teacher, resolve=True)
