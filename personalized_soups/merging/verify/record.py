"""Compare everything except the tensors of a merged folder with its soup.json: files, inputs, configuration, record."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import MethodRecord, SoupRecord, TruncationRecord
from personalized_soups.files.atomic import files_below
from personalized_soups.files.file_names import CONFIG_FILE, SOUP_FILE
from personalized_soups.files.strict_json import parse_json
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.verify.verification import Fault, Subject
from personalized_soups.merging.writing.model_record import json_text, untied_tables

# Keys of soup.json that other checks compare, and keys that say where and with which versions the soup was computed.
_NOT_COMPARED = {
    "profile",
    "method_source",
    "experts",
    "base",
    "base_folder",
    "on",
    "on_folder",
    "truncation",
    "device",
    "versions",
    "files",
}

# Two computations of a truncation error agree if they differ by at most this share of the error. Errors below 0.1 lose
# digits. For such an error, the allowed difference is the same as for an error of 0.1.
_ERROR_TOLERANCE = 1e-5


def file_faults(folder: Path, record: SoupRecord) -> Iterator[Fault]:
    """Yield a fault for each missing file and for each file that the merge did not write. Hidden files are ignored."""
    present = {name for name in files_below(folder) if not any(part.startswith(".") for part in Path(name).parts)}
    for name in sorted(set(record.files) - present):
        yield Fault("file", name, "is missing")
    for name in sorted(present - set(record.files)):
        yield Fault("file", name, "was not written by the merge")


def input_faults(record: SoupRecord, library: ExpertLibrary, digests: Mapping[Path, str]) -> Iterator[Fault]:
    """Yield a fault for each file of an expert that has changed since the merge."""
    for expert in record.experts:
        adapter = library[expert.name].adapter
        actual = {path.name: digests[path] for path in adapter.files}
        yield from digest_faults("expert", str(adapter.folder), expert.blake3, actual)


def digest_faults(
    subject: Subject, folder: str, recorded: Mapping[str, str], actual: Mapping[str, str]
) -> Iterator[Fault]:
    """Yield a fault for each file of a folder that has changed since the merge.

    Args:
        subject: the kind of thing that the folder contains.
        folder: the folder.
        recorded: the digests that soup.json records, by the file's name.
        actual: the digests of the files now, by the file's name.
    """
    for name in sorted({*recorded, *actual}):
        where = str(Path(folder) / name)
        if name not in actual:
            yield Fault(subject, where, "was read by the merge, but is missing now")
        elif name not in recorded:
            yield Fault(subject, where, "was added after the merge")
        elif recorded[name] != actual[name]:
            what = f"has changed since the merge: BLAKE3 {actual[name][:12]}, expected {recorded[name][:12]}"
            yield Fault(subject, where, what)


def fingerprint_faults(record: SoupRecord, actual: str, where: str) -> Iterable[Fault]:
    """Return a fault if the fingerprint of the base differs from the recorded fingerprint."""
    if record.base.fingerprint in {None, actual}:
        return []
    what = f"is another base: fingerprint {actual[:12]}, expected {(record.base.fingerprint or '')[:12]}"
    return [Fault("base", where, what)]


def configuration_faults(folder: Path, expected: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each key of adapter_config.json whose value differs from what the merge writes."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return  # file_faults reports it
    actual = parse_json(path.read_bytes(), path)
    if not isinstance(actual, dict):
        yield Fault("configuration", CONFIG_FILE, "is not a JSON object")
        return
    yield from _unequal("configuration", f"{CONFIG_FILE}: ", actual, json.loads(json.dumps(expected)))


def record_faults(record: SoupRecord, expected: SoupRecord) -> Iterator[Fault]:
    """Yield a fault for each key of soup.json that a merge of its profile and inputs would write differently.

    Args:
        record: the soup.json of the folder.
        expected: the record of the repeated merge.
    """
    skipped = _NOT_COMPARED | {"base_blake3"}
    if record.method_source is not None:
        # The module of a function in a script is `__main__`, or another name if another program imports the script. So
        # the names of the methods are not compared here; method_faults compares the source file.
        skipped = skipped | {"method"}
    tables = [soup.model_dump(mode="json", exclude=skipped) for soup in (record, expected)]
    yield from _unequal("record", f"{SOUP_FILE}: ", *tables)
    weights = {expert.name: expert.weight for expert in expected.experts}
    for expert in record.experts:
        if expert.weight != weights[expert.name]:
            what = f"is {expert.weight!r}, but the profile gives {weights[expert.name]!r}"
            yield Fault("record", f"{SOUP_FILE}: the weight of {expert.name}", what)
    yield from _adapter_faults(record, expected)
    yield from _truncation_faults(record.truncation, expected.truncation)


def _adapter_faults(record: SoupRecord, expected: SoupRecord) -> Iterator[Fault]:
    """Yield a fault if the base adapter is another one. Its name and its folder may change."""
    digests = [None if soup.on is None else soup.on.digest for soup in (record, expected)]
    if digests[0] != digests[1]:
        yield Fault("record", f"{SOUP_FILE}: on", f"is the adapter {digests[0]}, but the merge reads {digests[1]}")
    if (record.on_folder is None) != (expected.on_folder is None):
        what = "includes" if record.on_folder is not None else "does not include"
        yield Fault(
            "record", f"{SOUP_FILE}: on_folder", f"says that the soup {what} the adapter, but it is the opposite"
        )


def missing_method_fault(record: SoupRecord) -> Fault:
    """Return the fault of a soup whose method is from outside the package and was not given to `verify`."""
    source = record.method_source
    assert source is not None
    return Fault(
        "record",
        f"{SOUP_FILE}: method",
        f"the soup was merged by {source.module}:{source.function}, a method from outside this package; "
        "give the method, so that verify can recompute the tensors",
    )


def method_faults(record: SoupRecord, given: MethodRecord | None) -> Iterator[Fault]:
    """Yield the differences between the method given to `verify` and the recorded method.

    They may differ in the function or in the contents of its source file.
    """
    source = record.method_source
    if source is None or given is None:
        return
    where = f"{SOUP_FILE}: method_source"
    if source.function != given.function:
        yield Fault(
            "record", where, f"the method given is {given.function}, but the soup was merged by {source.function}"
        )
    if source.blake3 != given.blake3:
        digests = f"BLAKE3 {given.blake3[:12]}, expected {source.blake3[:12]}"
        yield Fault("record", where, f"the source file of {given.function} has changed since the merge: {digests}")


def _truncation_faults(actual: TruncationRecord | None, expected: TruncationRecord | None) -> Iterator[Fault]:
    where = f"{SOUP_FILE}: truncation"
    if actual is None or expected is None:
        if actual is not expected:
            yield Fault(
                "record", where, "is missing" if actual is None else "is present, but this soup is not truncated"
            )
        return
    exact = {"rank", "energy", "ranks"}
    yield from _unequal("record", f"{where}.", actual.model_dump(include=exact), expected.model_dump(include=exact))
    recorded = {"total": actual.total, **actual.modules}
    errors = {"total": expected.total, **expected.modules}
    for name in sorted({*recorded, *errors}):
        before, now = recorded.get(name), errors.get(name)
        if before is None or now is None or abs(before - now) > _ERROR_TOLERANCE * max(now, 0.1):
            yield Fault(
                "record", f"{where}: {name}", f"is a truncation error of {before}, but the recomputed error is {now}"
            )


def other_file_faults(folder: Path, record: SoupRecord, changes: Changes) -> Iterator[Fault]:
    """Yield a fault for each file without tensors that differs from the base's file.

    If the merge unties the embeddings, some files are compared with the base's files with untied embeddings.
    """
    model = changes.model
    tables = untied_tables(changes)
    for name in sorted(set(record.files) - {SOUP_FILE, *model.checkpoint.shards}):
        path = folder / name
        if not path.is_file():
            continue  # file_faults reports it
        if name in tables:
            is_equal = path.read_bytes() == json_text(tables[name]).encode()
        elif (model.folder / name).is_file():
            is_equal = filecmp.cmp(path, model.folder / name, shallow=False)
        else:
            yield Fault("configuration", name, "does not exist in the base")
            continue
        if not is_equal:
            untied = " with untied embeddings" if name in tables else ""
            yield Fault("configuration", name, f"differs from the base's{untied}")


def _unequal(subject: Subject, where: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Fault]:
    for key in sorted({*actual, *expected}):
        if actual.get(key) != expected.get(key):
            yield Fault(subject, f"{where}{key}", f"is {actual.get(key)!r}, expected {expected.get(key)!r}")
