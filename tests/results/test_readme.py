import json
import re
import subprocess
from dataclasses import replace

import pytest
from convergence_tools import curve, decay, write_run
from flow_chain_tools import chain, write_chain
from quality_tools import REAL, students, write_measured

from launch.evaluate.convergence import compare_runs
from launch.evaluate.quality import compare_quality
from results.readme import ROOT, main, measured_entries, section, updated
from stillhouse.analysis.convergence_tables import markdown
from stillhouse.analysis.curve_files import from_json, to_json
from stillhouse.analysis.flow_chain import from_json as chain_from_json
from stillhouse.analysis.flow_chain import to_json as chain_to_json
from stillhouse.analysis.flow_tables import markdown as flows_markdown
from stillhouse.analysis.quality import from_json as quality_from_json
from stillhouse.analysis.quality import to_json as quality_to_json
from stillhouse.analysis.quality_tables import markdown as quality_markdown
from stillhouse.metrics.records import save_records

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


def test_every_value_has_its_provenance_or_says_that_there_is_none():
    """And what a provenance says has the form of a revision and of hashes."""
    found = [
        entry for path in (ROOT / "results").glob("*.json") for entry in measured_entries(json.loads(path.read_text()))
    ]
    assert len(found) > 100
    for entry in found:
        if entry["provenance"] is not None:
            assert set(entry["provenance"]) == {"revision", "config", "weights"}
            assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", entry["provenance"]["revision"])
            hashes = (entry["provenance"]["config"], entry["provenance"]["weights"])
            assert hashes == (None, None) if entry.get("subject") == "real" else all(len(text) == 64 for text in hashes)


def test_provenance_reaches_the_tables(tmp_path):
    """From a run's metrics.json into results and what the README says of them."""
    provenance = {"revision": "a" * 40, "config": "b" * 64, "weights": "c" * 64}
    records = [replace(record, provenance=provenance) for record in students({1: 0.5})]
    run = write_measured(tmp_path / "run", [*records, REAL])
    for command in ("record", "quality"):
        target = tmp_path / f"{command}.json"
        main([command, str(target), str(run)])
        content = json.loads(target.read_text())
        assert measured_entries(content)[0]["provenance"] == provenance
        assert section(target).endswith(f"; 1 of {len(measured_entries(content))} values have their provenance.")
    curved = write_run(tmp_path / "base", curve("base", decay(0.3)))
    save_records(curved / "metrics.json", records)
    main(["compare", str(tmp_path / "compare.json"), str(curved)])
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["comparison"]["runs"][0]["provenance"] == provenance
    assert from_json(content["comparison"]).curves[0].provenance == provenance


def test_comparisons_say_where_they_come_from_and_agree_with_their_curves():
    for path in (ROOT / "results").glob("*.json"):
        content = json.loads(path.read_text())
        if "comparison" in content:
            assert set(content) == {"date", "commit", "machine", "comparison"}
            assert json.loads(json.dumps(to_json(from_json(content["comparison"])))) == content["comparison"]
            assert path.with_suffix(".png").exists()
        if "quality" in content:
            assert set(content) == {"date", "commit", "machine", "quality"}
            assert quality_to_json(quality_from_json(content["quality"])) == content["quality"]
            assert path.with_suffix(".png").exists()
        if "flows" in content:
            assert set(content) == {"date", "commit", "machine", "flows"}
            assert chain_to_json(chain_from_json(content["flows"])) == content["flows"]
            assert path.with_suffix(".png").exists()


def test_a_comparison_is_stored_drawn_and_shown(tmp_path):
    runs = [write_run(tmp_path / "base", curve("base", decay(0.3), every=1309))]
    runs.append(write_run(tmp_path / "fast", curve("fast", decay(0.3))))
    target = tmp_path / "results" / "race.json"
    main(["compare", str(target), *map(str, runs)])
    assert sorted(path.name for path in target.parent.iterdir()) == ["race.json", "race.png"]
    content = json.loads(target.read_text())
    assert set(content) == {"date", "commit", "machine", "comparison"}
    assert from_json(content["comparison"]) == compare_runs(runs)
    title, picture, *tables, source = section(target).split("\n\n")
    assert title == "**race**"
    assert picture.endswith("](results/race.png)")
    assert "\n\n".join(tables) == markdown(compare_runs(runs))
    assert "13.1x" in "\n\n".join(tables)
    assert source.startswith("From `results/race.json`: commit ")


def test_quality_at_several_numbers_of_steps_is_stored_drawn_and_shown(tmp_path):
    runs = [
        write_measured(tmp_path / f"sfd{steps}", [*students({steps: 1 / (1 + steps)}), REAL], steps=steps)
        for steps in (1, 4)
    ]
    target = tmp_path / "results" / "few.json"
    main(["quality", str(target), *map(str, runs)])
    assert sorted(path.name for path in target.parent.iterdir()) == ["few.json", "few.png"]
    content = json.loads(target.read_text())
    assert set(content) == {"date", "commit", "machine", "quality"}
    assert quality_from_json(content["quality"]) == compare_quality(runs)
    title, picture, *tables, source = section(target).split("\n\n")
    assert (title, picture) == ("**few**", "![Metric against network evaluations](results/few.png)")
    assert "\n\n".join(tables) == quality_markdown(compare_quality(runs))
    assert "| sfd | 0 | 0.5 | 0.2 |" in tables[1]
    assert source.startswith("From `results/few.json`: commit ")


def test_a_chain_of_flows_is_stored_drawn_and_shown(tmp_path):
    target = tmp_path / "results" / "chain.json"
    main(["flows", str(target), str(write_chain(tmp_path / "flows"))])
    assert sorted(path.name for path in target.parent.iterdir()) == ["chain.json", "chain.png"]
    content = json.loads(target.read_text())
    assert set(content) == {"date", "commit", "machine", "flows"}
    assert chain_from_json(content["flows"]) == chain()
    title, picture, *tables, source = section(target).split("\n\n")
    assert (title, picture) == ("**chain**", "![Metric against the number of the flow](results/chain.png)")
    assert "\n\n".join(tables) == flows_markdown(chain())
    assert source.startswith("From `results/chain.json`: commit ")
    with pytest.raises(FileNotFoundError, match="no measured flows at"):
        main(["flows", str(target), str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="results.readme flows results/NAME.json"):
        main(["flows", str(target)])


@pytest.mark.parametrize("command", ["compare", "quality"])
def test_a_comparison_needs_runs(tmp_path, command):
    with pytest.raises(SystemExit, match="results.readme compare results/NAME.json runs/A"):
        main([command, str(tmp_path / "race.json")])
    with pytest.raises(FileNotFoundError, match="holds (no|neither a) run"):
        main([command, str(tmp_path / "race.json"), str(tmp_path)])


def test_files_that_the_readme_names_exist():
    """All but what a run makes and what the reader is told to write."""
    named = set(re.findall(r"(?:\]\(|`)([\w./-]+/[\w.-]+\.(?:py|yaml|png|json|safetensors))(?:\)|`)", README))
    own = {"conf/local/default.yaml", "lightning_modules/my_method.py", "conf/method/my_method.yaml"}
    assert len(named - own) > 5
    assert not {name for name in named - own if "NAME" not in name and not (ROOT / name).exists()}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git clone")
def test_what_the_readmes_commands_leave_is_ignored_by_git():
    """Also by `ruff check .`, which passes over what git ignores."""
    commands = [line for line in README.splitlines() if re.match(r"python (evaluate|train)\.py", line)]
    named = {path for line in commands for path in re.findall(r"(?:report|export|hydra\.sweep\.dir)=([\w./-]+)", line)}
    assert {"report.html", "exports/NAME", "runs/lr"} <= named
    left = [
        *named,
        "runs/NAME",
        "runs/sweep-seed.md",
        "data/digits",
        "weights/vgg16.pth",
        "wandb/run",
        "conf/local/default.yaml",
    ]
    ignored = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(ignored.stdout.split()) == set(left)
