"""What a measurement of runs or of a teacher leaves behind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.evaluate.measure import Evaluation
from launch.evaluate.quality import draw_measured
from stillhouse.analysis.tables import records_text
from stillhouse.metrics.records import Record, load_records, merge_records, save_records
from stillhouse.metrics.sampling import Sampler

RESULT_FILES = ("metrics.json", "samples.png", "interpolation.png", "quality.png")


def write_results(
    folder: Path, records: Sequence[Record], evaluation: Evaluation, samplers: Mapping[str, Sampler]
) -> None:
    """Write `RESULT_FILES`: records, added to those of other measurements that are there, and pictures.

    Args:
        folder: The place of the files.
        records: What was measured.
        evaluation: How.
        samplers: What the pictures show, by title.

    Raises:
        OSError: Where the disk refuses.
    """
    path = folder / "metrics.json"
    stored = load_records(path) if path.exists() else []
    save_records(path, merge_records(stored, records))
    evaluation.pictures(folder, dict(samplers))
    draw_measured(folder / "quality.png", records)
    print(f"{path} written", flush=True)


def print_table(records: Sequence[Record]) -> None:
    """Print the records' table, if there are any."""
    if records:
        print(f"\n{records_text(records)}", flush=True)
