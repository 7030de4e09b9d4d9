import json
import re
from dataclasses import replace

import pytest
from convergence_tools import curve, decay, stored, write_run
from flow_chain_tools import chain, write_chain
from quality_tools import REAL, students, teachers, write_measured

from results import pages
from results.__main__ import main
from results.pages import README, RESULTS, measured_entries, section, updated
from results.trained import TrainedRuns
from stillhouse.analysis.compare_convergence import compare_runs
from stillhouse.analysis.compare_quality import compare_quality
from stillhouse.analysis.convergence import convergence_from_json, convergence_markdown, convergence_to_json
from stillhouse.analysis.flow_chain import flow_chain_from_json, flow_chain_markdown, flow_chain_to_json
from stillhouse.analysis.quality import quality_from_json, quality_markdown, quality_to_json
from stillhouse.files import write_ordered_json
from stillhouse.metrics.provenance import short_revision
from stillhouse.metrics.records import Record, save_records

FILES = sorted(RESULTS.glob("*.json"))
# What is stored under a key is what the code makes of it.
ROUND_TRIPS = {
    "comparison": lambda content: json.loads(json.dumps(convergence_to_json(convergence_from_json(content)))),
    "quality": lambda content: quality_to_json(quality_from_json(content)),
    "flows": lambda content: flow_chain_to_json(flow_chain_from_json(content)),
    "claims": lambda content: json.loads(json.dumps(TrainedRuns.from_json(content).to_json())),
    "records": lambda content: [vars(Record(**entry)) for entry in content],
}


def runs(folder):
    """Two runs with curves and records whose provenance is known."""
    provenance = {"revision": "a" * 40, "config": "b" * 64, "weights": "c" * 64}
    found = []
    for name, every, value in (("base", 1309, 0.5), ("fast", 100, 0.2)):
        run = write_run(folder / name, curve(name, decay(0.3), every=every))
        save_records(run / "metrics.json", [replace(r, provenance=provenance) for r in students({1: value})] + [REAL])
        found.append(run)
    return found


def test_the_readmes_table_is_that_of_the_results(monkeypatch):
    """A hand edit of the README's results, or results without an update, fails here; unlike measurements are never mixed."""
    text = README.read_text()
    assert updated(text) == text
    with pytest.raises(ValueError, match="has lost the lines"):
        updated("no table")
    monkeypatch.setattr(pages, "_SUMMARY", (("flows-digits", "no such flow", "a row"),))
    with pytest.raises((ValueError, KeyError)):
        updated(text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_say_where_they_come_from_and_agree_with_their_values(path):
    content = json.loads(path.read_text())
    assert section(path)
    if path.stem.startswith("benchmarks") or path.stem == "support":
        return
    (key,) = ROUND_TRIPS.keys() & set(content)
    assert {"date", "commit", "machine"} < set(content)
    assert _given(ROUND_TRIPS[key](content[key])) == _given(content[key])
    assert key in ("records", "claims") or path.with_suffix(".png").exists()
    for entry in measured_entries(content):
        assert "values" not in entry or len(entry["values"]) >= 3, f"{entry['name']} has fewer than three values"
        if entry["provenance"] is not None:
            assert set(entry["provenance"]) == {"revision", "config", "weights"}
            # Unknown where there was no git: a machine that was lent for minutes.
            assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", entry["provenance"]["revision"] or "0" * 40)
            hashes = (entry["provenance"]["config"], entry["provenance"]["weights"])
            assert hashes == (None, None) if entry.get("subject") == "real" else all(len(text) == 64 for text in hashes)


def _given(content):
    """Without what is null: later versions know of more entries than the file does."""
    if isinstance(content, dict):
        return {key: _given(value) for key, value in content.items() if value is not None}
    return [_given(value) for value in content] if isinstance(content, list) else content


@pytest.mark.parametrize(
    ("kind", "measured"),
    [
        ("compare", lambda found: convergence_markdown(compare_runs(stored(found)))),
        ("quality", lambda found: quality_markdown(compare_quality(stored(found)))),
    ],
)
def test_a_comparison_is_stored_drawn_and_shown(tmp_path, kind, measured):
    found = runs(tmp_path)
    if kind == "quality":
        found = [write_measured(tmp_path / f"sfd{n}", [*students({n: 1 / (1 + n)}), REAL], steps=n) for n in (1, 4)]
    target = tmp_path / "results" / "race.json"
    main([kind, str(target), *map(str, found)])
    assert sorted(path.name for path in target.parent.iterdir()) == ["race.json", "race.png"]
    picture, *tables, source = section(target, pictures="../somewhere").split("\n\n")
    assert picture.endswith("](../somewhere/race.png)")
    assert "\n\n".join(tables) == measured(found)
    commit = json.loads(target.read_text())["commit"]
    assert source.startswith(f"From `results/race.json`: commit {short_revision(commit)}, ")
    entries = measured_entries(json.loads(target.read_text()))
    if kind == "compare":
        assert {entry["provenance"]["revision"] for entry in entries} == {"a" * 40}
        assert source.endswith("; 2 of 2 values have their provenance.")
        assert "13.1x" in "\n\n".join(tables)
    with pytest.raises(SystemExit, match=r"results compare results/NAME.json runs/A"):
        main([kind, str(target)])
    with pytest.raises(FileNotFoundError, match="holds (no|neither a) run"):
        main([kind, str(target), str(tmp_path)])


def test_qualities_are_added_to_those_of_a_machine_that_is_gone(tmp_path):
    def measured(name, seed, values, **changes):
        # Its teacher is the run that was measured first, which has no second line.
        taught = [replace(record, name="sfd0") for record in teachers({1: 0.5})]
        records = [replace(record, **changes) for record in (*students(values), *taught, REAL)]
        return write_measured(tmp_path / name, records, seed=seed, steps=1)

    target = tmp_path / "race.json"
    main(["quality", str(target), str(measured("sfd0", 0, {1: 0.5}))])
    content = json.loads(target.read_text())
    write_ordered_json(target, {**content, "machine": "another"})
    main(["quality", str(target), str(measured("sfd1", 1, {1: 0.3, 2: 0.1}))])
    both = json.loads(target.read_text())
    assert both["machine"] == f"another; {content['machine']}"
    (line,) = both["quality"]["lines"]
    assert [(point["nfe"], point["mean"], point["seeds"]) for point in line["points"]] == [
        (1, 0.4, [0, 1]),
        (2, 0.1, [1]),
    ]
    with pytest.raises(ValueError, match=r"race.json can't take these runs: .*; name another file"):
        main(["quality", str(target), str(measured("sfd2", 2, {1: 0.3}, fingerprint={"num_samples": 7}))])
    with pytest.raises(
        ValueError, match="sfd1 of it and fast of these would both be 'sfd' of seed 1 with 1 NFE; name ano"
    ):
        main(["quality", str(target), str(measured("fast", 1, {1: 0.3}))])
    assert json.loads(target.read_text()) == both


def test_records_and_a_chain_of_flows_are_stored_and_shown(tmp_path):
    target = tmp_path / "records.json"
    main(["record", str(target), *map(str, runs(tmp_path))])
    assert json.loads(target.read_text())["runs"] == ["base", "fast"]
    assert "values have their provenance" in section(target)
    target = tmp_path / "chain.json"
    main(["flows", str(target), str(write_chain(tmp_path / "flows"))])
    assert target.with_suffix(".png").exists()
    picture, *tables, _ = section(target).split("\n\n")
    assert picture == "![Metric against the number of the flow](results/chain.png)"
    assert "\n\n".join(tables) == flow_chain_markdown(chain())
    with pytest.raises(FileNotFoundError, match="no measured flows at"):
        main(["flows", str(target), str(tmp_path / "none.json")])
