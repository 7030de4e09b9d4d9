"""Docstrings as plain text with mathematics in it: what reStructuredText would read as markup there is escaped."""

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
_MARKUP = re.compile(r"(?<!\\)([*|\\]|(?<=\w)_(?!\w))")
_SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Note|Raises|Returns|Yields|Errors):\s*$")


def plain(lines: list[str]) -> list[str]:
    """A docstring with `*`, `|` and trailing `_` escaped outside of code, and indented formulas as literal blocks."""
    shown: list[str] = []
    text, in_section = "\n".join(lines), False
    literal = False
    for before, line in zip(["", *lines], text.splitlines(), strict=False):
        in_section = in_section or bool(_SECTION.match(line))
        indented = line.startswith("    ") and not in_section
        if indented and not literal and not before.strip():
            shown += ["::", ""]
            literal = True
        elif literal and line.strip() and not indented:
            literal = False
        shown.append(line if literal else escaped(line))
    return shown


def escaped(line: str) -> str:
    """A line of prose without markup but for its code."""
    parts = _CODE.split(line)
    return "".join(part if i % 2 else _MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # Before the first line of a property napoleon would look for a type that ends in a colon.
    lines[:] = ([r"\ "] if what in ("attribute", "data", "property") else []) + plain(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}
