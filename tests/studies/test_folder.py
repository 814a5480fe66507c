"""A folder that is cleared holds nothing that a study would read again."""

from __future__ import annotations

from pathlib import Path

from personalized_soups.studies.folder import StudyFolder

WRITTEN = (
    "study.json", "results.json", "report.md", "examples.json", "samples.md", "seconds.json", "memory.json",
    "fluency.yaml", "pool.jsonl", "pairs/warm.jsonl", "experts/warm/expert.json", "merged/linear/warm/soup.json",
    "answers/pool.jsonl", "external/koala.json", "questions/pool.json", "judges/style.json",
    "judges/style/classifier.json", "combinations.png", "sweeps.png", "persona.png",
)  # fmt: skip


def test_clear_removes_what_a_study_writes_and_keeps_other_files(tmp_path: Path) -> None:
    for name in (*WRITTEN, "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    StudyFolder(tmp_path).clear()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]
