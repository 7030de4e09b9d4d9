import json
import re

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
    """All but what a run makes and what the reader is told to write."""
    named = set(re.findall(r"(?:\]\(|`)([\w./-]+/[\w.-]+\.(?:py|yaml|png|json|safetensors))(?:\)|`)", README))
    own = {"conf/local/default.yaml", "lightning_modules/my_method.py", "conf/method/my_method.yaml"}
    assert len(named - own) > 5
    assert not {name for name in named - own if "NAME" not in name and not (ROOT / name).exists()}
