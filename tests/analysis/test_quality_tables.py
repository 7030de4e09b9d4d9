from dataclasses import replace

from stillhouse.analysis.quality import Quality, QualityValue, quality_markdown, quality_rows, quality_text
from stillhouse.metrics.records import comparable_id

PRINT = {"num_samples": 2000}


def sfd(seed, nfe, mean):
    return QualityValue(f"sfd{seed}", "sfd", seed, nfe, mean, "ema")


VALUES = (
    QualityValue("digits", "teacher digits (heun)", None, 19, 0.16, None),
    *(sfd(*row) for row in [(0, 1, 0.3), (1, 1, 0.5), (2, 1, 0.4), (0, 2, 0.2), (2, 2, 0.22), (1, 4, 0.15)]),
)


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_numbers_by_hand():
    heading, header, rule, *rows, fingerprint = quality_text(Quality("fid", PRINT, VALUES, floor=0.09931)).splitlines()
    assert heading == (
        "fid against NFE (ema): mean ± standard deviation over training seeds; real images score 0.09931"
    )
    assert cells(header) == ["group", "seeds", "1 NFE", "2 NFE", "4 NFE", "19 NFE"]
    assert [cells(row) for row in rows] == [
        ["sfd", "0, 1, 2", "0.40 ± 0.10", "0.210 ± 0.014 (seed 0, 2)", "0.15 (seed 1)", "–"],
        ["teacher digits (heun)", "–", "–", "–", "–", "0.16"],
    ]
    assert fingerprint == f"fingerprint {comparable_id(PRINT)} (num_samples 2000)"
    assert len(rule) == len(header)


def test_costs_are_ranges_over_trainings_and_their_heading_says_so():
    few, many = ({"kimg": kimg, "seconds": None, "network evaluations": kimg * 1e5} for kimg in (10.0, 30.0))
    values = [replace(sfd(0, nfe, 0.3), costs=few) for nfe in (1, 2)] + [replace(sfd(1, 1, 0.5), costs=many), VALUES[0]]
    quality = Quality("fid", PRINT, tuple(values))
    assert quality_text(quality).startswith(
        "fid against NFE (ema): mean ± standard deviation over training seeds, costs as least .. greatest\n"
    )
    header, first, teacher = quality_rows(quality)
    assert header[-3:] == ["19 NFE", "kimg", "network evaluations"]
    assert (first[-2:], teacher[-2:]) == (["10 .. 30", "1,000,000 .. 3,000,000"], ["–", "–"])


def test_one_seed_has_no_spread():
    table = quality_text(Quality("fid", PRINT, (sfd(0, 1, 0.3), sfd(0, 2, 0.2)), notes=("b left out",)))
    assert table.splitlines()[0] == "fid against NFE (ema): one training seed each"
    assert "± " not in table
    assert table.endswith("\n\nnote: b left out")


def test_markdown():
    quality = Quality("fid", PRINT, VALUES, notes=("one", "two"))
    heading, table, fingerprint, notes = quality_markdown(quality).split("\n\n")
    assert "real images" not in heading
    assert table.splitlines()[:2] == [
        "| group | seeds | 1 NFE | 2 NFE | 4 NFE | 19 NFE |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    assert fingerprint.startswith("fingerprint ")
    assert notes == "- one\n- two"
