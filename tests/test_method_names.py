"""The core asks a method by its hooks, and knows none of them: a new one is one file and one YAML."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = {path.stem for path in (ROOT / "conf/method").glob("*.yaml")}
CLASSES = {
    node.name
    for path in (ROOT / "lightning_modules").glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef) and any(isinstance(part, ast.FunctionDef) for part in node.body)
}


@pytest.mark.parametrize("room", ["launch", "callbacks", "stillhouse", "datamodules"])
def test_no_method_is_known_by_its_class_or_name(room):
    assert {"DiffInstruct", "ProgressiveDistillation"} <= CLASSES
    assert {"diff_instruct", "progressive"} <= NAMES
    known = set()
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            word = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
            if word in CLASSES or (isinstance(node, ast.Constant) and node.value in NAMES):
                known.add(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not known
