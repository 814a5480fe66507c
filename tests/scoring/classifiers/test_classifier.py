from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError, OutputExistsError
from personalized_soups.scoring.classifiers.classifier import (
    Classifier,
    ClassifierRecord,
    StatesOf,
    open_classifier,
)
from personalized_soups.scoring.classifiers.labelled_texts import LabelledText, check_texts, read_labelled_texts
from personalized_soups.scoring.classifiers.logistic import LogisticModel
from personalized_soups.scoring.classifiers.training import train_classifier
from personalized_soups.scoring.classifiers.vocabulary import Vocabulary, terms_of

ITEMS = [("How?", "I am glad, so glad!"), ("How?", "Whatever."), ("", ""), ("Why?", "Nothing known here")]


def _small() -> Classifier:
    model = LogisticModel(np.array([2.0, -1.5, 0.5]), -0.25)
    return Classifier(model, Vocabulary(("!", "glad", "whatever")), {"seed": 3})


def test_the_value_is_the_chance_of_a_logistic_regression_on_normed_log_counts() -> None:
    exclaimed, glad = math.log(2), math.log(3)
    norm = math.hypot(exclaimed, glad)
    log_odds = [(2.0 * exclaimed - 1.5 * glad) / norm - 0.25, 0.5 - 0.25, -0.25, -0.25]
    expected = [1 / (1 + math.exp(-odds)) for odds in log_odds]
    np.testing.assert_allclose(_small().values(ITEMS), expected, rtol=1e-12)


def test_terms_are_words_marks_and_neighbours() -> None:
    assert terms_of("Don\u2019t wait 20 min?") == [
        "don't", "wait", "0", "min", "?", "don't wait", "wait 0", "0 min", "min ?",
    ]  # fmt: skip
    assert Vocabulary.of(["a b", "a b", "a c", "a"], min_texts=2).terms == ("a", "a b", "b")
    assert Vocabulary.of(["a b", "a b", "a c", "a"], min_texts=1, max_terms=1).terms == ("a",)


def test_a_saved_classifier_gives_the_same_values(tmp_path: Path) -> None:
    classifier = _small()
    record = classifier.save(tmp_path / "tone")
    opened = open_classifier(tmp_path / "tone")
    assert np.array_equal(opened.values(ITEMS), classifier.values(ITEMS))
    assert opened.digest == classifier.digest == record.digest
    assert opened.about == {"seed": 3}
    assert sorted(path.name for path in (tmp_path / "tone").iterdir()) == ["classifier.json", "classifier.safetensors"]
    with pytest.raises(OutputExistsError):
        classifier.save(tmp_path / "tone")
    classifier.save(tmp_path / "tone", overwrite=True)


def test_the_digest_depends_on_terms_and_weights() -> None:
    other_terms = Classifier(_small().model, Vocabulary(("!", "glad", "well")))
    other_weights = Classifier(LogisticModel(np.array([2.0, -1.5, 0.5001]), -0.25), _small().features)
    other_intercept = Classifier(LogisticModel(np.array([2.0, -1.5, 0.5]), 0.0), _small().features)
    assert len({each.digest for each in (_small(), other_terms, other_weights, other_intercept)}) == 4


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda row: row | {"vocabulary_version": 2}, "vocabulary version 2"),
        (lambda row: row | {"terms": ["!", "glad", "gone"]}, "the terms in classifier.json"),
        (lambda row: row | {"kind": "trees"}, "kind"),
        (lambda row: row | {"more": 1}, "more"),
        (lambda row: {key: row[key] for key in row if key != "digest"}, "digest"),
    ],
)
def test_a_damaged_record_is_rejected(tmp_path: Path, change: object, what: str) -> None:
    _small().save(tmp_path / "tone")
    path = tmp_path / "tone" / "classifier.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(FileFormatError, match=what) as caught:
        open_classifier(tmp_path / "tone")
    assert caught.value.where == str(path)


def test_damaged_and_missing_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no classifier"):
        open_classifier(tmp_path)
    _small().save(tmp_path / "tone")
    weights = tmp_path / "tone" / "classifier.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FileFormatError, match="not the one that"):
        open_classifier(tmp_path / "tone")
    weights.unlink()
    with pytest.raises(FileFormatError, match="missing"):
        open_classifier(tmp_path / "tone")


def test_a_classifier_of_hidden_states_needs_the_same_states(tmp_path: Path) -> None:
    def states_of(items: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        texts = [answer for _, answer in items]  # type: ignore[attr-defined]
        return np.array([[text.count("a"), text.count("b"), len(text), 7.0] for text in texts], dtype=np.float64)

    texts = [
        LabelledText("", letter * (3 + number) + "x" * (20 - number), letter == "a", f"{number}", f"{number}")
        for number in range(15)
        for letter in "ab"
    ]
    classifier, report = train_classifier(texts, states_of=states_of, states_digest="d1", about={"base": "tiny"})
    assert report.accuracy.value == 1.0
    classifier.save(tmp_path / "tone")

    def opener(record: ClassifierRecord) -> tuple[StatesOf, str]:
        assert record.about["base"] == "tiny"
        return states_of, "d1"

    opened = open_classifier(tmp_path / "tone", states=opener)
    items = [("", "aaaa"), ("", "bbbb")]
    assert np.array_equal(opened.values(items), classifier.values(items))
    assert opened.values(items)[0] > 0.5 > opened.values(items)[1]
    with pytest.raises(IncompatibleExpertsError, match="other hidden states"):
        open_classifier(tmp_path / "tone", states=lambda _: (states_of, "d2"))
    with pytest.raises(FileFormatError, match="needs the hidden states"):
        open_classifier(tmp_path / "tone")


def test_texts_are_read_from_lines_folders_and_json(tmp_path: Path) -> None:
    lines = tmp_path / "high.txt"
    lines.write_text("\ufeffone\n\n two \n", encoding="utf-8")
    folder = tmp_path / "low"
    folder.mkdir()
    (folder / "b.txt").write_text("a text\nof two lines\n")
    (folder / "a.jsonl").write_text('{"text": "t"}\n{"prompt": "p", "answer": "u"}\n{"text": "v", "group": "g"}\n')
    (folder / "c.bin").write_bytes(b"\xff")
    found = [(text.text, text.is_high, text.prompt, text.group) for text in read_labelled_texts(lines, folder)]
    assert found == [
        ("one", True, "", f"{lines}:1"),
        ("two", True, "", f"{lines}:3"),
        ("t", False, "", f"{folder / 'a.jsonl'}:1"),
        ("u", False, "p", "p"),
        ("v", False, "", "g"),
        ("a text\nof two lines", False, "", str(folder / "b.txt")),
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": 1}', '{"text": " "}', '{"text": "a", "group": 2}', "[" * 9999])
def test_a_faulty_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "high.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match="not a JSON object") as caught:
        read_labelled_texts(path, path)
    assert caught.value.where == f"{path}:2"


def test_empty_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    for path, what in ((empty, "holds no text"), (binary, "not UTF-8"), (tmp_path / "gone.txt", "can't be read")):
        with pytest.raises(InputError, match=what) as caught:
            read_labelled_texts(path, path)
        assert caught.value.where == str(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder holds no text"):
        read_labelled_texts(tmp_path / "folder", empty)


def _plain(text: str, is_high: bool, where: str) -> LabelledText:
    return LabelledText("", text, is_high, where, where)


def test_the_same_text_in_both_classes_is_rejected_and_a_repeated_one_counts_once() -> None:
    texts = [
        _plain(f"{label} {number}", label == "high", f"{label}:{number}")
        for label in ("high", "low")
        for number in range(5)
    ]
    assert check_texts([*texts, _plain("high 1", True, "again")], num_least=5) == texts
    with pytest.raises(InputError, match="same text is in both classes: 'high 1'") as caught:
        check_texts([*texts, _plain("high 1", False, "other.txt:9")], num_least=5)
    assert caught.value.where == "other.txt:9"
    assert "high:1" in caught.value.what


def test_too_few_texts_are_rejected() -> None:
    texts = [_plain(f"high {number}", True, f"{number}") for number in range(20)]
    with pytest.raises(InputError, match="the low class has 0 different texts"):
        train_classifier(texts)
    with pytest.raises(InputError, match="the low class has 1 different texts"):
        train_classifier([*texts, *[_plain("the same", False, f"{number}") for number in range(20)]])
