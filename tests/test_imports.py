"""The direction of imports: programs -> launch -> lightning_modules, datamodules, callbacks -> stillhouse -> torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import of this project beside itself; within the library in an order, each what stands before it.
LIBRARY = (
    "files",
    "file_locks",
    "checks",
    "ranks",
    "networks",
    "checkpoints",
    "diffusion",
    "metrics",
    "pictures",
    "analysis",
)
ALLOWED = {
    "stillhouse": set(),
    "datamodules": {"stillhouse"},
    "callbacks": {"stillhouse"},
    "lightning_modules": {"datamodules", "stillhouse"},
    "launch": {"callbacks", "lightning_modules", "datamodules", "stillhouse"},
    "hydra_plugins": {"launch"},
    "train": {"launch"},
    "evaluate": {"launch"},
}
PROGRAMS = {
    "train",
    "evaluate",
    "benchmarks",
    "results",
    "tests",
    "docs",
    "examples",
}  # of which nobody imports anything
# By file, the beginnings of what it imports all the same.
EXCEPTIONS = {
    "callbacks/requeue.py": ("launch.signals.",),  # a program catches signals before it has imported anything heavy
}
# Frameworks that a room does without.
FOREIGN = {
    "stillhouse": {"pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb"},
    "datamodules": {"hydra", "omegaconf", "wandb"},
    "callbacks": {"hydra", "omegaconf"},
    "lightning_modules": {"hydra", "omegaconf", "wandb"},
}


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it, and the names that it takes from them, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_stands_below_them(room):
    ours, forbidden = {*ALLOWED, *PROGRAMS} - {room}, FOREIGN.get(room, set())
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(room)
        for name in imported(path)
        if (top := name.split(".")[0]) in forbidden or top in ours - ALLOWED[room]
        if not name.startswith(EXCEPTIONS.get(str(path.relative_to(ROOT)), ()))
    }
    assert not wrong


def test_the_library_imports_in_one_order():
    modules = {path.stem for path in (ROOT / "stillhouse").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules - {"__init__", "__pycache__"} == set(LIBRARY)
    wrong = set()
    for path in files("stillhouse"):
        room = path.relative_to(ROOT / "stillhouse").with_suffix("").parts[0]
        below = LIBRARY[: LIBRARY.index(room) + 1] if room in LIBRARY else ()
        used = {name.split(".")[1] for name in imported(path) if name.startswith("stillhouse.")}
        wrong |= {f"{path.relative_to(ROOT)} imports stillhouse.{other}" for other in used - set(below)}
    assert not wrong
