from flow_chain_tools import chain

from stillhouse.analysis.flow_chain import flow_chain_markdown, flow_chain_text


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_numbers_by_hand():
    flows, students, bounds, fingerprint, note = flow_chain_text(chain()).split("\n\n")
    heading, header, _, *rows = flows.splitlines()
    assert heading.endswith("standard deviation over blocks of seeds; real images: fid 0.1")
    assert "S (50 Euler steps) ± standard error over 2,000 samples" in heading
    assert cells(header) == ["k", "flow", "NFE", "step drift", "end drift", "S", "fid, simulated", "fid, Euler 1"]
    assert [cells(row) for row in rows] == [
        ["1", "rf1 (flow_heun)", "19", "–", "–", "3.00 ± 0.10", "0.200 ± 0.010", "20.00 ± 0.10"],
        ["2", "rf2 (flow_heun)", "19", "4.00 ± 0.20", "4.00 ± 0.20", "0.500 ± 0.020", "0.300 ± 0.010", "0.80 ± 0.10"],
        ["3", "rf3 (flow_heun)", "19", "1.00 ± 0.10", "6.25 ± 0.30", "0.200 ± 0.010", "0.400 ± 0.010", "0.60 ± 0.10"],
    ]
    _, header, _, *rows = students.splitlines()
    assert cells(header) == ["k", "group", "seeds", "NFE", "r", "fid"]
    assert [cells(row) for row in rows] == [
        ["2", "flow_distill (ema)", "0, 1", "1", "0.37 ± 0.17", "0.450 ± 0.071"],
        ["3", "flow_distill (ema)", "0", "1", "1", "0.6"],
        ["3", "bezier (ema)", "0", "1", "–", "0.55"],
    ]
    heading, header, _, *rows = bounds.splitlines()
    assert "W2 between 1,797 samples and as many real images" in heading
    assert cells(header) == ["k", "distribution", "W2 of Φ_1", "steps", "root of r", "bound", "W2"]
    assert [cells(row) for row in rows] == [
        ["1", "rf1", "2.5", "0", "–", "2.5", "2.5"],
        ["2", "rf2", "2.5", "2", "–", "4.5", "2.6"],
        ["3", "rf3", "2.5", "3", "–", "5.5", "2.7"],
        ["2", "flow_distill", "2.5", "2", "0.60 ± 0.14", "5.1", "2.8"],
        ["3", "flow_distill", "2.5", "3", "1", "6.5", "2.8"],
        ["3", "bezier", "2.5", "3", "–", "–", "2.8"],
    ]
    assert fingerprint.startswith("fingerprint ")
    assert note == "note: a note"


def test_markdown():
    _, table, _, students, _, bounds, fingerprint, notes = flow_chain_markdown(chain()).split("\n\n")
    assert table.splitlines()[0] == "| k | flow | NFE | step drift | end drift | S | fid, simulated | fid, Euler 1 |"
    assert [len(part.splitlines()) for part in (table, students, bounds)] == [5, 5, 8]
    assert fingerprint.startswith("fingerprint ")
    assert notes == "- a note"
