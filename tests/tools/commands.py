"""The commands of README and docs/: every line of their ```bash blocks, and how a test shrinks it."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from omegaconf import OmegaConf

from benchmarks.measuring import ROOT

PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
PROGRAMS = ("train.py", "evaluate.py")
_CONFIG = OmegaConf.load(ROOT / "conf/config.yaml")
_NOT_IN_NAMES = ",".join([*_CONFIG.hydra.job.config.override_dirname.exclude_keys, "trainer"])
_PICTURES = (
    "teacher.network.model_channels=8",
    "teacher.network.num_blocks=1",
    "evaluation.num_samples=10",
    "evaluation.training.num_samples=10",
)


@dataclass(frozen=True)
class Command:
    """One line of a page. needs: what stands after "# needs", which a test has not; "" for a command that a test runs."""

    page: Path
    words: tuple[str, ...]
    needs: str

    @property
    def program(self) -> str | None:
        """train.py or evaluate.py; None for any other command."""
        return self.words[1] if self.words[0] == "python" and self.words[1] in PROGRAMS else None

    @property
    def arguments(self) -> list[str]:
        """Of a program: all that follows its name."""
        return list(self.words[2:])

    @property
    def options(self) -> list[str]:
        """The arguments as Hydra composes them, without -m and other flags; of options that are swept over the first value."""
        given = [first for first, *_ in map(_values, self.arguments) if "=" in first]
        if "--config-dir" in self.arguments:
            folder = ROOT / self.arguments[self.arguments.index("--config-dir") + 1]
            given.append(f"hydra.searchpath=[file://{folder}]")
        return given

    def shrunk(self) -> list[str]:
        """The arguments of the same command at a size of seconds; of one swept option two values are left, of the others one."""
        if "-m" not in self.arguments:
            arguments = self.arguments
        else:
            swept = [word for word in self.arguments if len(_values(word)) > 1]
            arguments = [
                word if len(_values(word)) < 2 else _joined(word, _values(word)[: 2 if word == swept[0] else 1])
                for word in self.arguments
            ]
            arguments.append(f"hydra.job.config.override_dirname.exclude_keys=[{_NOT_IN_NAMES}]")
        if self.program == "evaluate.py":
            samples = (
                any(re.match(r"(teacher|flows)=", word) for word in arguments) and "task=self_test" not in arguments
            )
            return [*arguments, *(["num_samples=40", "blocks=2"] if samples else [])]
        arguments = [
            word for word in arguments if not word.startswith("method.kimg=")
        ]  # which trainer=debug has its own of
        debug = [] if any(word.startswith("trainer=") for word in arguments) else ["trainer=debug"]
        # In debug's few steps the values of an EDM teacher's images span more than those of the flows beside it.
        steps = ["teacher.steps=10"] if "method=bezier" in arguments else []
        return [*arguments, *debug, *steps, *(_PICTURES if "data=image_folder" in arguments else [])]


def _values(word: str) -> list[str]:
    """KEY=VALUE for each value that an option sweeps over; the word itself where it does not."""
    if "=" not in word:
        return [word]
    (override,) = OverridesParser.create().parse_overrides([word])
    if not override.is_sweep_override():
        return [word]
    key = word.partition("=")[0]
    if isinstance(override.value(), ChoiceSweep):
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.value().start}"]  # an interval


def _joined(word: str, values: list[str]) -> str:
    key = word.partition("=")[0]
    listed = ",".join(value.partition("=")[2] for value in values)
    return f"{key}=choice({listed})" if "choice(" in word else f"{key}={listed}"


def commands(page: Path) -> list[Command]:
    """The page's commands, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = itertools.chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks)
    found = []
    for line in lines:
        if words := shlex.split(line, comments=True):
            needs = re.search(r"\s# needs (.+)$", line)
            found.append(Command(page, tuple(words), needs[1] if needs else ""))
    return found
