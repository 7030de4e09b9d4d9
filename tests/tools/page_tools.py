"""A web page as a reader sees it."""

import base64
from html.parser import HTMLParser


class Page(HTMLParser):
    """headings: {level: texts}; tables: rows of cells each; pictures: (alt text, PNG bytes); text: all of it.

    What would be fetched from elsewhere, or run, is in `foreign`.
    """

    def __init__(self, html: str):
        super().__init__()
        self.headings: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.pictures: list[tuple[str, bytes]] = []
        self.foreign: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        options = dict(attributes)
        if tag == "img":
            kind, _, data = options["src"].partition(";base64,")
            if kind != "data:image/png":
                self.foreign.append(options["src"])
            self.pictures.append((options["alt"], base64.b64decode(data)))
        if tag in ("script", "link", "iframe", "object") or any(key.startswith("on") for key in options):
            self.foreign.append(tag)
        if tag == "a" and not options["href"].startswith("#"):
            self.foreign.append(options["href"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.setdefault(tag, []).append("")
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            if "url(" in data or "@import" in data:
                self.foreign.append("style")
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self._open and self._open[-1] in self.headings:
            self.headings[self._open[-1]][-1] += data
