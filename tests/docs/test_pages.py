"""README and docs/ as Markdown: links lead somewhere, files that are named exist, and the site builds."""

import re
import subprocess
import sys

import pytest
from commands import PAGES

from benchmarks.measuring import ROOT

# What a run makes, or a reader; no file of the repository.
_MADE = re.compile(r"^(runs|data|weights|exports|my_photos)/|NAME|conf/local/default.yaml")


def anchors(path):
    """The places of a page that a link can name: its headings and the labels before them."""
    text = path.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() or "reference/generated" in target, f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}: {path.name} has no such heading"
    for named in re.findall(r"`([\w.]+/[\w./-]+\.(?:py|yaml|png|json|safetensors|sh))`", text):
        assert _MADE.search(named) or (ROOT / named).exists(), f"{page.name} names {named}, which is not there"


def test_the_readme_is_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    assert lines[2].startswith("![")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--nitpicky", "--fail-on-warning", "--keep-going"]
    built = subprocess.run([*command, "docs", str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html/index.html").exists()
