"""`{measured} NAME` on a page: the tables and the picture of results/NAME.json, made anew at every build.

With `:pending:` a file that is not there yet says so in a sentence.
"""

from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from results.pages import RESULTS, section


class Measured(SphinxDirective):
    """Puts one file of results/ on a page."""

    required_arguments = 1
    option_spec: ClassVar = {"pending": directives.flag}

    def run(self) -> list[nodes.Node]:
        path = RESULTS / f"{self.arguments[0]}.json"
        if not path.is_file() and "pending" in self.options:
            return [nodes.paragraph("", "Not measured yet.")]
        if not path.is_file():
            raise self.error(f"there is no results/{path.name}")
        self.env.note_dependency(str(path))
        text = section(path, pictures="/../results")  # from the root of docs/
        node = nodes.container(classes=["measured"])
        self.state.nested_parse(StringList(text.splitlines(), str(path)), 0, node)
        return [node]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
