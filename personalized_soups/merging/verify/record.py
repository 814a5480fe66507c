"""Where a merged folder is otherwise than it claims, but for its tensors: files, inputs, configuration, record."""

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

# Compared by themselves, or no part of what is claimed: where and by what it was computed.
_NOT_COMPARED = {
    "profile",
    "method_source",
    "experts",
    "base",
    "base_folder",
    "truncation",
    "device",
    "versions",
    "files",
}

# Two computations of one relative error agree better than this; that of an error of nearly 0 has no more digits.
_ERROR_TOLERANCE = 1e-5


def of_files(folder: Path, record: SoupRecord) -> Iterator[Fault]:
    """Tell what is missing in a folder and what the merge did not write; hidden files are left out."""
    present = {name for name in files_below(folder) if not any(part.startswith(".") for part in Path(name).parts)}
    for name in sorted(set(record.files) - present):
        yield Fault("file", name, "is missing")
    for name in sorted(present - set(record.files)):
        yield Fault("file", name, "was not written by the merge")


def of_inputs(record: SoupRecord, library: ExpertLibrary, digests: Mapping[Path, str]) -> Iterator[Fault]:
    """Tell which files of the experts have changed since they were merged."""
    for expert in record.experts:
        adapter = library[expert.name].adapter
        found = {path.name: digests[path] for path in adapter.files}
        yield from of_digests("expert", str(adapter.folder), expert.blake3, found)


def of_digests(subject: Subject, folder: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterator[Fault]:
    """Tell which files of one folder have changed, by their recorded digests and those found."""
    for name in sorted({*recorded, *found}):
        where = str(Path(folder) / name)
        if name not in found:
            yield Fault(subject, where, "was read by the merge and is not there")
        elif name not in recorded:
            yield Fault(subject, where, "was not there when the soup was merged")
        elif recorded[name] != found[name]:
            told = f"has changed since: BLAKE3 {found[name][:12]}, recorded {recorded[name][:12]}"
            yield Fault(subject, where, told)


def of_fingerprint(record: SoupRecord, found: str, where: str) -> Iterable[Fault]:
    """Tell whether a base is another one than the recorded."""
    if record.base.fingerprint in {None, found}:
        return []
    told = f"is another base: fingerprint {found[:12]}, recorded {(record.base.fingerprint or '')[:12]}"
    return [Fault("base", where, told)]


def of_configuration(folder: Path, expected: Mapping[str, Any]) -> Iterator[Fault]:
    """Tell where adapter_config.json is not what the merge would write."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return  # told of as a missing file
    found = parse_json(path.read_bytes(), path)
    if not isinstance(found, dict):
        yield Fault("configuration", CONFIG_FILE, "is no table")
        return
    yield from _unequal("configuration", f"{CONFIG_FILE}: ", found, json.loads(json.dumps(expected)))


def of_record(record: SoupRecord, expected: SoupRecord) -> Iterator[Fault]:
    """Tell where soup.json says otherwise than what it says of its own profile and inputs comes to."""
    skipped = _NOT_COMPARED | {"base_blake3"}
    if record.method_source is not None:
        # a function has another name when it is imported from elsewhere: of_method compares its source
        skipped = skipped | {"method"}
    found, wanted = (each.model_dump(mode="json", exclude=skipped) for each in (record, expected))
    yield from _unequal("record", f"{SOUP_FILE}: ", found, wanted)
    weights = {expert.name: expert.weight for expert in expected.experts}
    for expert in record.experts:
        if expert.weight != weights[expert.name]:
            told = f"says {expert.weight!r}, the profile gives {weights[expert.name]!r}"
            yield Fault("record", f"{SOUP_FILE}: the weight of {expert.name}", told)
    yield from _of_truncation(record.truncation, expected.truncation)


def of_missing_method(record: SoupRecord) -> Fault:
    """Return the fault of a soup whose method is from outside the package and was not given."""
    source = record.method_source
    assert source is not None
    return Fault(
        "record",
        f"{SOUP_FILE}: method",
        f"the tensors cannot be recomputed: the soup was merged by {source.module}:{source.function}, a method from "
        "outside this package; give the method, to recompute them",
    )


def of_method(record: SoupRecord, given: MethodRecord | None) -> Iterator[Fault]:
    """Yield a fault if a method from outside the package is another function than the recorded one."""
    source = record.method_source
    if source is None or given is None:
        return
    where = f"{SOUP_FILE}: method_source"
    if source.function != given.function:
        yield Fault("record", where, f"the method is {given.function}, recorded {source.function}")
    if source.blake3 != given.blake3:
        digests = f"BLAKE3 {given.blake3[:12]}, recorded {source.blake3[:12]}"
        yield Fault("record", where, f"the source file of {given.function} has changed since: {digests}")


def _of_truncation(found: TruncationRecord | None, wanted: TruncationRecord | None) -> Iterator[Fault]:
    where = f"{SOUP_FILE}: truncation"
    if found is None or wanted is None:
        if found is not wanted:
            yield Fault("record", where, f"is {'missing' if found is None else 'of a soup that is not truncated'}")
        return
    exact = {"rank", "energy", "ranks"}
    yield from _unequal("record", f"{where}.", found.model_dump(include=exact), wanted.model_dump(include=exact))
    told = {"total": found.total, **found.modules}
    errors = {"total": wanted.total, **wanted.modules}
    for name in sorted({*told, *errors}):
        one, other = told.get(name), errors.get(name)
        if one is None or other is None or abs(one - other) > _ERROR_TOLERANCE * max(other, 0.1):
            yield Fault("record", f"{where}: {name}", f"says an error of {one}, recomputed {other}")


def of_other_files(folder: Path, record: SoupRecord, changes: Changes) -> Iterator[Fault]:
    """Compare every file that holds no weights with the base's, or with what untying makes of it."""
    model = changes.model
    tables = untied_tables(changes)
    for name in sorted(set(record.files) - {SOUP_FILE, *model.checkpoint.shards}):
        path = folder / name
        if not path.is_file():
            continue  # told of as a missing file
        if name in tables:
            is_equal = path.read_bytes() == json_text(tables[name]).encode()
        elif (model.folder / name).is_file():
            is_equal = filecmp.cmp(path, model.folder / name, shallow=False)
        else:
            yield Fault("configuration", name, "is not in the base")
            continue
        if not is_equal:
            yield Fault("configuration", name, "is not the base's" + (", untied" if name in tables else ""))


def _unequal(subject: Subject, where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Fault]:
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            yield Fault(subject, f"{where}{key}", f"is {found.get(key)!r}, expected {wanted.get(key)!r}")
