"""A data set that nobody prepared for us, described only by a YAML file, trains at the first try."""

import random
from pathlib import Path

import pytest

from hetegen_rec.cli import main
from hetegen_rec.evaluation.results import read_evaluation

CONFIG = """
name: library
run_dir: {directory}/run
data:
  train: [{directory}/loans/2023-*.{suffix}, {directory}/loans/2024-01.{suffix}]
  valid: {directory}/loans/2024-02.{suffix}
  prepared_dir: {directory}/prepared
features:
  label: Borrowed?
  user: reader
  fields:
    - {{name: reader, kind: id, column: "Reader No.", min_count: 2}}
    - {{name: title, kind: id, column: título}}
    - {{name: shelf, kind: categorical, column: shelf/row}}
    - {{name: pages, kind: numeric, column: "# pages"}}
    - {{name: subjects, kind: multi_valued, column: "subjects, all", max_length: 3}}
    - {{name: borrowed_before, kind: sequence, table: title, column: borrowed before, max_length: 2}}
model: {{dim: 8}}
train: {{batch_size: 64, max_steps: 4}}
"""
HEADER = [
    "Borrowed?",
    "Reader No.",
    "título",
    "shelf/row",
    "# pages",
    "subjects, all",
    "borrowed before",
    "note",
]


def write_month(path: Path, num_rows: int, separator: str) -> None:
    draw = random.Random(path.name)
    lines = [[f'"{name}"' for name in HEADER]]
    for _ in range(num_rows):
        shelf = draw.choice(["A/1", "B/2", ""])
        titles = [f"Böcklin {draw.randrange(12)}" for _ in range(draw.randrange(4))]
        subjects = draw.sample(["art", "law", "sea"], draw.randrange(3))
        lines.append(
            [
                str(int(draw.random() < (0.8 if shelf == "A/1" else 0.2))),
                f"R-{draw.randrange(20):03d}",
                f"Böcklin {draw.randrange(12)}",
                shelf,
                draw.choice(["", f"{draw.randrange(40, 900)}"]),
                f'"{"|".join(subjects)}"',
                "|".join(titles),
                "never read",
            ]
        )
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_own_data_trains_at_the_first_try(suffix, separator, tmp_path):
    (tmp_path / "loans").mkdir()
    for month in ("2023-11", "2023-12", "2024-01", "2024-02"):
        write_month(tmp_path / "loans" / f"{month}.{suffix}", 150, separator)
    config = tmp_path / "library.yaml"
    config.write_text(CONFIG.format(directory=tmp_path, suffix=suffix), encoding="utf-8")
    assert main(["demo", "--config", str(config)]) == 0
    evaluation = read_evaluation(tmp_path / "run" / "scratch")
    assert evaluation["splits"].keys() == {"valid"}  # no test split was named
    assert evaluation["splits"]["valid"]["n"] == 150
    assert (tmp_path / "run" / "report.html").exists()
