import json
from dataclasses import asdict, replace

import pytest

from stillhouse.metrics.records import Record, load_records, merge_records, save_records


def record(**changes):
    fingerprint = {"extractor": "digits", "num_samples": 100, "precision": "32-true", "weights": "ema"}
    base = Record("run", "fid_digits", "student", 1, 5.5, 0.5, [5.0, 5.5, 6.0], 1000.0, fingerprint, teacher="digits")
    return replace(base, **changes)


def test_round_trip(tmp_path):
    records = [record(), record(subject="real", name="digits", nfe=0, images_per_second=None, std=None, steps=3)]
    path = tmp_path / "metrics.json"
    save_records(path, records)
    assert load_records(path) == records
    entry = json.loads(path.read_text())[0]
    assert entry["metric"] == "fid_digits"
    assert entry["values"] == [5.0, 5.5, 6.0]
    assert entry["fingerprint"]["weights"] == "ema"
    assert list(tmp_path.iterdir()) == [path]


def test_merging_replaces_the_same_measurement_and_keeps_all_others():
    old = [record(), record(nfe=2), record(subject="teacher", name="digits", nfe=35, steps=18, solver="heun")]
    other_samples = record(fingerprint=record().fingerprint | {"num_samples": 50})
    raw = record(fingerprint=record().fingerprint | {"weights": "raw"})
    more_steps = replace(old[2], steps=17)
    merged = merge_records(old, [record(mean=4.0), other_samples, raw, more_steps])
    assert merged == [record(mean=4.0), *old[1:], other_samples, raw, more_steps]


def test_only_the_choice_of_weights_is_left_out_of_what_must_be_alike():
    one = record()
    assert one.comparable_id == record(fingerprint=one.fingerprint | {"weights": None}).comparable_id
    assert one.comparable_id == record(fingerprint=dict(reversed(one.fingerprint.items()))).comparable_id
    for change in ({"num_samples": 200}, {"precision": "bf16-mixed"}, {"extractor": "inception"}, {"reference": "x"}):
        assert one.comparable_id != record(fingerprint=one.fingerprint | change).comparable_id


def changed(**changes):
    return json.dumps([asdict(record()) | changes])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[{", "Expecting"),
        ("", "Expecting value"),
        ("{}x", "Extra data"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "it is empty"),
        ("{}", "it is empty"),
        ("null", "it holds a NoneType"),
        ("[1]", "a record is a dict, not 1"),
        ('["ab"]', "a record is a dict, not 'ab'"),
        ('[{"name": "a"}]', "missing 7 required positional arguments: 'metric'"),
        ('[{"name": "a", "mood": 1}]', "unknown entries mood"),
        (changed(mean="0.3"), "mean is '0.3'"),
        (changed(mean=float("nan")), "mean is nan"),
        (changed(mean=True), "mean is True"),
        (changed(nfe=1.5), "nfe is 1.5"),
        (changed(values=None), "values is None"),
        (changed(values=["1"]), r"values is \['1'\]"),
        (changed(fingerprint=["digits"]), r"fingerprint is \['digits'\]"),
        (changed(provenance="abc"), "provenance is 'abc'"),
        (changed(training={"step": 3}), "training must have step, reached, total"),
        (changed(training={"step": "3", "reached": 3, "total": 3}), "training is {'step': '3'"),
    ],
)
def test_damaged_files_are_refused_by_name_and_left_alone(tmp_path, content, reason):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"metrics\.json is damaged or no list of metrics \(.*{reason}"):
        load_records(path)
    assert path.read_text() == content


def test_a_record_says_whether_training_went_on_after_it(tmp_path):
    half = record(training={"step": 4, "reached": 6, "total": 13})
    whole = record(training={"step": 4, "reached": 13, "total": 13})
    assert [r.unfinished for r in (half, whole, record())] == [True, False, False]
    save_records(tmp_path / "metrics.json", [half])
    assert load_records(tmp_path / "metrics.json") == [half]
    assert merge_records([half], [whole]) == [whole]


def test_missing_file_and_unknown_subject_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics at .*metrics\.json; measure the run"):
        load_records(tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="one of teacher, student, real, got 'pupil'"):
        record(subject="pupil")


def test_a_value_that_is_no_number_never_reaches_the_disk(tmp_path):
    path = tmp_path / "metrics.json"
    save_records(path, [record()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_records(path, [record(mean=float("nan"))])
    assert path.read_bytes() == before


def test_a_disk_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*metrics\.json: .*free some space there"):
        save_records(tmp_path / "file" / "metrics.json", [record()])
