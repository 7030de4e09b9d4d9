from dataclasses import replace

from stillhouse.analysis.tables import markdown_table, records_markdown, records_text
from stillhouse.metrics.records import Record

FINGERPRINT = {"extractor": "digits", "reference": "ab" * 32, "num_samples": 100, "precision": "32-true"}
STUDENT = Record(
    "ds", "fid_digits", "student", 1, 5.512, 0.123, [5.4, 5.5, 5.6], 3500.0, FINGERPRINT | {"weights": "ema"}
)
TEACHER = Record("digits", "fid_digits", "teacher", 35, 2.0, None, [2.0], 100.0, FINGERPRINT, steps=18, solver="heun")
REAL = Record("digits", "fid_digits", "real", 0, 0.3, 0.02, [0.3], None, FINGERPRINT)


def lines(records):
    return records_text(records).splitlines()


def test_one_fingerprint_gives_one_aligned_table():
    heading, header, rule, teacher, student, real = lines([STUDENT, REAL, TEACHER])
    assert heading == (
        f"fingerprint {STUDENT.comparable_id} "
        "(extractor digits, reference abababab, num_samples 100, precision 32-true)"
    )
    assert header.split() == ["name", "subject", "NFE", "fid_digits", "images/s", "speed-up"]
    assert teacher.split("  ")[0] == "digits"
    assert "teacher (heun, 18 steps)" in teacher
    assert student.split() == ["ds", "student", "(ema)", "1", "5.51", "±", "0.12", "3,500", "35.0x"]
    assert real.split() == ["digits", "real", "0", "0.300", "±", "0.020", "–", "–"]
    assert len({len(line) for line in (header, rule, teacher, student, real)}) == 1


def test_unlike_fingerprints_never_share_a_table():
    other = replace(STUDENT, name="other", fingerprint=STUDENT.fingerprint | {"num_samples": 50})
    first, second = records_text([STUDENT, TEACHER, other]).split("\n\n")
    assert "other" not in first.split("\n", 1)[1]
    assert "ds" not in second.split("\n", 1)[1]
    assert first.startswith(
        f"fingerprint {STUDENT.comparable_id}, not to be compared with the others: num_samples 100 ("
    )
    assert second.startswith(f"fingerprint {other.comparable_id}, not to be compared with the others: num_samples 50 (")
    assert "speed-up" in second
    assert second.rstrip().endswith("–"), "no teacher with this fingerprint, so no speed-up"


def test_raw_and_averaged_weights_and_several_metrics_share_a_table():
    raw = replace(STUDENT, mean=6.0, fingerprint=STUDENT.fingerprint | {"weights": "raw"})
    kid = replace(STUDENT, metric="kid_digits", mean=0.00123, std=0.00004)
    _, header, _, first, second = lines([STUDENT, kid, raw])
    assert header.split()[3:5] == ["fid_digits", "kid_digits"]
    assert "student (ema)" in first
    assert "0.001230 ± 0.000040" in first
    assert "student (raw)" in second
    assert second.split().count("–") == 2  # no KID of the raw weights, no teacher to be faster than


def test_speed_up_is_over_the_students_own_teacher_at_its_most_evaluations():
    fast = replace(TEACHER, nfe=9, steps=5, images_per_second=350.0)
    foreign = replace(TEACHER, name="foreign", nfe=71, images_per_second=1.0)
    assert lines([fast, TEACHER, STUDENT])[-1].endswith("35.0x")
    assert lines([fast, TEACHER, foreign, STUDENT])[-1].endswith("–"), "ambiguous"
    assert lines([fast, TEACHER, foreign, replace(STUDENT, teacher="digits")])[-1].endswith("35.0x")
    assert lines([foreign, replace(STUDENT, teacher="digits")])[-1].endswith("–")


def test_markdown_holds_the_same_cells():
    text = records_markdown([TEACHER, STUDENT]).splitlines()
    assert text[0] == "| name | subject | NFE | fid_digits | images/s | speed-up |"
    assert text[1] == "| --- | --- | ---: | ---: | ---: | ---: |"
    assert text[3] == "| ds | student (ema) | 1 | 5.51 ± 0.12 | 3,500 | 35.0x |"
    assert STUDENT.comparable_id in text[5]


def test_a_cell_cannot_end_its_row_or_column():
    assert markdown_table([["a|b", "c"], ["x\ny", "|"]]) == [r"| a\|b | c |", "| --- | --- |", r"| x y | \| |"]


def test_an_unfinished_training_is_marked():
    half = replace(STUDENT, training={"step": 4, "reached": 6, "total": 13})
    assert "student (ema, after 4 of 13 training steps)" in records_text([half])
    assert "student (ema) " in records_text([replace(half, training={"step": 4, "reached": 13, "total": 13})])
