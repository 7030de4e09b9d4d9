"""Every command of README and docs/ composes; a slow test runs it, unless it says what it needs that is not here."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
from commands import PAGES, commands
from end_to_end_tools import run
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from picture_files import encoded, folder_of, pattern

from benchmarks.measuring import ROOT
from launch.command_line import choose_task
from launch.run.names import register_resolvers

ALL = [command for page in PAGES for command in commands(page)]


def test_a_command_is_run_or_says_what_it_needs():
    assert len(ALL) > 60
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in ALL:
        if command.words[0] == "make":
            assert command.words[1] in targets, command
        elif command.words[0] == "export":
            assert all("=" in word for word in command.words[1:])
        elif command.program is None:
            assert command.needs, (
                f"{command.page.name}: a test does not run {' '.join(command.words)}; say `# needs ...`"
            )
    assert sum(bool(command.needs) for command in ALL) < len(ALL) / 3


def test_commands_compose(monkeypatch):
    """Groups, choices and options of every command are there, also of those that need a GPU."""
    register_resolvers()
    composed = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for command in ALL:
            if not command.program or "teacher=runs/" in " ".join(command.words):  # the run is not there
                continue
            monkeypatch.setattr(sys, "argv", [command.program, *command.options])
            if command.program == "evaluate.py":
                choose_task()  # by what else it names
            options = sys.argv[1:]
            is_group = [(ROOT / "conf" / option.lstrip("+").partition("=")[0]).is_dir() for option in options]
            choices = tuple(o for o, group in zip(options, is_group, strict=True) if group or "hydra" in o)
            try:
                if (command.program, choices) not in composed:
                    name = "config" if command.program == "train.py" else "evaluate"
                    composed[command.program, choices] = compose(name, list(choices))
                for option in set(options) - set(choices):
                    key = option.partition("=")[0]
                    OmegaConf.update(composed[command.program, choices].copy(), key, None, merge=False)
            except Exception as error:
                raise AssertionError(f"{command.page.name}: {' '.join(command.words)}") from error
            if command.program == "evaluate.py" and not command.needs:  # train.py's are run with random weights
                weights = (composed[command.program, choices].get("teacher") or {}).get("weights")
                said = f"{command.page.name}: {' '.join(command.words)} reads {weights}; say `# needs ...`"
                assert not weights or weights.startswith("runs/") or (ROOT / weights).exists(), said


def test_what_commands_leave_is_ignored_by_git():
    """Also by `ruff check .`, which passes over what git ignores."""
    words = [word for command in ALL for word in command.words]
    named = {word.partition("=")[2] for word in words if re.match(r"(target|hydra\.sweep\.dir)=", word)}
    left = [
        *named,
        "runs/NAME",
        "runs/sweep-seed.md",
        "data/digits",
        "weights/vgg16.pth",
        "wandb/run",
        "docs/_build/html",
    ]
    assert len(named) > 2
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git clone")
    ignored = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(ignored.stdout.split()) == set(left)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not c.needs for c in commands(page))], ids=lambda p: p.stem
)
def test_commands_run(page, tmp_path):
    """In the order of the page, in one folder, each at a size of seconds."""
    for name in ("pretrained", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder_of(tmp_path / "my_photos", {f"{i}.png": encoded(pattern(80, 72, shift=i)) for i in range(24)})
    exported: dict[str, str] = {}
    for command in commands(page):
        if command.words[0] == "export":
            exported |= dict(word.split("=", 1) for word in command.words[1:])
        elif command.program and not command.needs:
            fresh = any(
                word.startswith("hydra/launcher=") for word in command.words
            )  # workers outlive a forked process
            options = {"fresh": True} if fresh else {"before": partial(set_environment, exported)}
            run(tmp_path, command.program, *command.shrunk(), **options).ok()


def set_environment(exported):
    """In a process that was forked from one that has started: PYTHONPATH takes effect by hand."""
    os.environ.update(exported)
    sys.path[:0] = [os.path.abspath(folder) for folder in exported.get("PYTHONPATH", "").split(":") if folder]
