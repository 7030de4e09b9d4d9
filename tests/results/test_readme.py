import json
import re
from pathlib import Path

from results.readme import ROOT, updated

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_results():
    """A hand edit of the README's results, or results without an update, fails here."""
    assert updated(README) == README


def test_results_say_where_they_come_from():
    files = [path for path in (ROOT / "results").glob("*.json") if "records" in json.loads(path.read_text())]
    assert files
    for path in files:
        content = json.loads(path.read_text())
        assert set(content) == {"date", "commit", "machine", "runs", "records"}
        for entry in content["records"]:
            assert len(entry["values"]) >= 3, f"{path.name}: {entry['name']} has fewer than three values"


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:\]\(|`)([\w./-]+\.(?:py|yaml|md|png|json|safetensors))(?:\)|`)", README))
    made_by_runs = {"config.yaml", "metrics.json", "metrics.csv", "samples.png", "curves.png", "interpolation.png"}
    missing = {n for n in named if not (ROOT / n).exists() and Path(n).name not in made_by_runs}
    assert named
    assert not {n for n in missing if "NAME" not in n and "my_" not in n and not n.startswith("student.")}
