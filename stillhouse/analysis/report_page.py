"""A report as one HTML page of tables and images that needs no other file, no script and no network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

REPORT_MARK = '<meta name="generator" content="Stillhouse report">'

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
body { margin: 0 auto; padding: 1.5rem; max-width: 1240px; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 2px solid #d6dbe1; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .4rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: #0b5cad; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; }
dt { color: #57606a; }
dd { margin: 0; overflow-wrap: anywhere; }
p, li { overflow-wrap: anywhere; max-width: 75rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
.caption { color: #57606a; font-size: .88rem; margin: .75rem 0 .25rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e7eb; text-align: right; vertical-align: top; white-space: nowrap; }
th { border-bottom: 2px solid #aab2bb; font-weight: 600; vertical-align: bottom; }
:is(th, td):nth-child(-n + 2), .words :is(th, td) { text-align: left; }
.words :is(th, td) { white-space: normal; min-width: 8rem; max-width: 16rem; overflow-wrap: anywhere; }
.words :is(th, td):first-child { min-width: 13rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; white-space: normal; min-width: 9rem;
  max-width: 22rem; overflow-wrap: anywhere; }
tbody tr:hover td { background: #f4f7fa; }
figure { margin: .5rem 0 1.25rem; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #57606a; font-size: .88rem; overflow-wrap: anywhere; }
.gallery { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
.gallery figure { margin: 0; max-width: 22rem; }
details { margin: .5rem 0 1rem; }
summary { cursor: pointer; color: #0b5cad; }
@media (max-width: 640px) {
  body { padding: .8rem; }
  figure.wide img { max-width: none; width: 40rem; }
  :is(th, td):first-child, .words :is(th, td):first-child { min-width: 6.5rem; max-width: 9rem; }
}
@media print {
  body { max-width: none; }
  .scroll { overflow: visible; }
  h2 { break-after: avoid; }
  figure { break-inside: avoid; }
}
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """A list of remarks; nothing where there are none."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first two columns are words and whose others are numbers.

    Attributes:
        rows: the header, then the body.
        caption: a line above it.
        words: whether all columns are words, which wrap.
        folded: if not empty, a line that opens the table by a click.
    """

    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Picture:
    """An image: the bytes of a PNG file, and in `alt` what it shows, in words."""

    png: bytes
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """Small images side by side."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


Block = Text | Notes | Table | Picture | Gallery | Heading


@dataclass(frozen=True)
class Section:
    """A part of the page with a title, which the navigation links to."""

    title: str
    blocks: Sequence[Block]


def html_page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The whole page as HTML; all text is escaped.

    Args:
        title: of the page.
        facts: (name, value) of what stands at the top.
        sections: in order.
    """
    links = "".join(f'<a href="#part{n}">{escape(s.title)}</a>' for n, s in enumerate(sections, 1))
    body = "\n".join(
        f'<section>\n<h2 id="part{n}">{escape(s.title)}</h2>\n{chr(10).join(map(_block, s.blocks))}\n</section>'
        for n, s in enumerate(sections, 1)
    )
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{REPORT_MARK}\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n<nav>{links}</nav>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Heading(text):
            return f"<h3>{escape(text)}</h3>"
        case Notes(lines):
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""
        case Table():
            return _table(block)
        case Picture():
            return _figure(block, "wide")
        case Gallery(pictures):
            return f'<div class="gallery">{"".join(_figure(picture, "small") for picture in pictures)}</div>'
    raise TypeError(f"no part of a page: {block!r}")


def _table(table: Table) -> str:
    header, *body = table.rows
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    kind = ' class="words"' if table.words else ""
    whole = f'{caption}<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    return f"<details><summary>{escape(table.folded)}</summary>{whole}</details>" if table.folded else whole


def _figure(picture: Picture, kind: str) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
    return f'<figure class="{kind}"><div class="scroll">{image}</div>{caption}</figure>'
