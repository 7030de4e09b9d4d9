"""Teachers by name: what stands in `method.teachers` becomes the configs that are built and kept in config.yaml."""

from typing import Any

from hydra import compose
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError

from launch.run.folder import RunFolder
from stillhouse.checkpoints.weights import read_card


def expand_teachers(cfg: DictConfig) -> None:
    """In place: each name in `method.teachers`, of a file in conf/teacher or of a run folder, becomes that teacher's config.

    A run's student is a teacher with the network that the run trained, and is called as the run.

    Errors: ValueError for a method without the teacher that it needs, a `teacher` that it would not see, a list of something
    else, a name that is neither, or a student of fewer evaluations than its teacher takes steps; FileNotFoundError for a run
    without a finished student.
    """
    if "teacher" in cfg.method and not _is_teacher(cfg):
        raise ValueError(
            f"method={cfg.method.name} needs a teacher, or the network of one: say teacher=NAME (conf/teacher)"
        )
    names = cfg.method.get("teachers")
    if names is None:
        return
    if isinstance(names, str) or not OmegaConf.is_list(names):
        raise ValueError(f"method.teachers={names} must be a list, such as 'method.teachers=[digits_rf1,digits_rf2]'")
    teacher = cfg.get("teacher") or {}
    if "name" in teacher and "teacher" not in cfg.method:
        raise ValueError(f"teacher={cfg.teacher.name} has no effect here: name the teachers in method.teachers")
    changes = {} if "name" in teacher else teacher  # what trainer=debug changes of any teacher
    with open_dict(cfg):
        cfg.method.teachers = [
            name if OmegaConf.is_dict(name) else OmegaConf.merge(teacher_config(name, "method.teachers"), changes)
            for name in names
        ]
        if changes:
            cfg.teacher = {}


def _is_teacher(cfg: DictConfig) -> bool:
    """Whether `method.teacher` describes one: conf/teacher/none.yaml does not, nor what a method changes of it."""
    try:
        teacher = cfg.method.teacher
    except InterpolationKeyError:  # of ~teacher
        return False
    return OmegaConf.is_dict(teacher) and "_target_" in teacher


def teacher_config(name: Any, option: str) -> DictConfig:
    """The config of one teacher by its name, which stands in `option`; errors as in `expand_teachers`."""
    if isinstance(name, str) and RunFolder(name).config.is_file():
        return _student(RunFolder(name), option)
    try:
        config = compose(config_name=f"teacher/{name}").get("teacher") if isinstance(name, str) else None
    except (MissingConfigException, ConfigCompositionException):
        config = None
    if not config:  # also conf/teacher/none.yaml
        raise ValueError(f"{option}: {name} is neither a file in conf/teacher nor a run folder")
    return config


def _student(folder: RunFolder, option: str) -> DictConfig:
    weights = folder.path / "student.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{option}: {folder.path} has no student.safetensors; finish that run first")
    config = students_teacher(folder.read_config())
    card = read_card(weights)
    taken = [value["nfe"] for key, value in card.get("metrics", {}).items() if key.endswith("/student")]
    if taken and max(taken) < config["steps"]:
        raise ValueError(
            f"{option}: the student of {folder.path} was distilled into {max(taken)} network evaluations and is no teacher to be "
            f"sampled in {config['steps']} steps; take a run of pretrain, rectified_flow or reflow"
        )
    # The hash: a run trained anew under this name is another teacher, which a resumed run must not go on with.
    return OmegaConf.create(config | {"name": folder.name, "weights": str(weights), "sha256": card["sha256"]})


def students_teacher(stored: DictConfig) -> dict[str, Any]:
    """The config of the teacher that a run's student began as, hence that of the student's network, from the run's config."""
    teacher = (
        stored.method.teacher if "teacher" in stored.method else stored.method.teachers[-1]
    )  # of several the last one
    return OmegaConf.to_container(teacher, resolve=True)
