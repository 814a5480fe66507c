"""The store against a plain dictionary, and what it refuses; SQLite and PostgreSQL alike."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, FileFormatError, SoupError, UsageError
from personalized_soups.users.profiles import imports
from personalized_soups.users.profiles import store as store_module
from personalized_soups.users.profiles.store import (
    ABSENT,
    ANY,
    MAX_USER_BYTES,
    ProfileStore,
    StoreUnavailable,
    UnknownProfile,
    VersionConflict,
)

# Any text that is a name: no NUL, no halves of surrogate pairs, not too long.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)
WEIGHTS = st.dictionaries(
    # an expert's name may hold NUL: it comes from code, not from a folder
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip),
    st.floats(-1e30, 1e30, allow_subnormal=True),
    min_size=1,
    max_size=4,
).filter(lambda weights: any(weights.values()))

TRICKS = (
    "'; DROP TABLE psoups_profiles; --", '"', "%", "_", "\\", "../../etc/passwd", "/", "..", ".", "a\nb", "\r\n",
    "\x01\x1b[31m", "\x7f\x85\u2028", "😀", "\U0010ffff", "\ufffe", "שלום\u202e", "é", "e\u0301", " ", "  u ", "NULL",
    "%(user)s", ":user", "?", "{}", "$1",
)  # fmt: skip


def of(user: str, weight: float = 0.5, **fields: object) -> Profile:
    return Profile.model_validate({"user": user, "weights": {"friendly": weight, "concise": 0.25}, **fields})


def test_writes_count_up_and_every_version_stays(store: ProfileStore) -> None:
    begin = datetime.now(UTC)
    first = store.put(of("u1", 0.1))
    second = store.put(of("u1", 0.2, method="ties", options={"density": 0.3}, rank=8, allow_opposed=True))
    other = store.put(of("u2", 0.3, normalize="sum"))
    assert (first.version, second.version, other.version) == (1, 2, 1)
    assert first.profile == of("u1", 0.1)
    assert store.get("u1") == second
    assert store.get("u1", 1) == first
    assert store.get("u1").profile == of("u1", 0.2, method="ties", options={"density": 0.3}, rank=8, allow_opposed=True)
    assert store.get("u2").profile == of("u2", 0.3, normalize="sum")
    assert store.history("u1") == [first, second]
    assert begin <= first.written_at <= second.written_at <= datetime.now(UTC)
    assert first.written_at.utcoffset() == timedelta(0)
    store.check_reachable()


def test_what_is_there_already_is_not_written_again(store: ProfileStore) -> None:
    first = store.put(of("u1"))
    # `normalize: none` is the default, said or unsaid
    assert store.put(of("u1", normalize="none")) == first
    assert store.put_many([of("u1")]) == 0
    assert store.history("u1") == [first]


def test_expected_versions_are_held_to(store: ProfileStore) -> None:
    with pytest.raises(VersionConflict) as absent:
        store.put(of("u1"), expected=3)
    assert absent.value.current is None
    assert store.put(of("u1", 0.1), expected=ABSENT).version == 1
    with pytest.raises(VersionConflict, match="'u1' is at version 1, but no profile was expected") as there:
        store.put(of("u1", 0.2), expected=ABSENT)
    assert there.value.current == 1
    assert store.put(of("u1", 0.2), expected=1).version == 2
    for expected in (1, 3):
        with pytest.raises(VersionConflict) as wrong:
            store.put(of("u1", 0.3), expected=expected)
        assert wrong.value.current == 2
        with pytest.raises(VersionConflict):
            store.delete("u1", expected=expected)
    assert store.put(of("u1", 0.4), expected=ANY).version == 3
    store.delete("u1", expected=3)
    with pytest.raises(UnknownProfile):
        store.get("u1")


def test_a_conflict_keeps_its_version_across_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(VersionConflict("what", where="where", mend="mend", current=7)))
    assert (type(error), error.current, error.mend) == (VersionConflict, 7, "mend")


def test_a_deleted_user_is_gone_with_the_history_and_no_version_is_used_twice(store: ProfileStore) -> None:
    for weight in (0.1, 0.2, 0.3):
        store.put(of("u1", weight))
    store.put(of("u2"))
    store.delete("u1")
    for ask in (store.get, store.history, store.delete):
        with pytest.raises(UnknownProfile, match="'u1'"):
            ask("u1")
    with pytest.raises(UnknownProfile):
        store.get("u1", 2)
    assert [each.profile.user for each in store.all()] == ["u2"]
    assert store.put(of("u1", 0.1)).version == 4
    # nor by whoever comes new, or back through an import
    assert store.put_many([of("u3")]) == 1
    assert store.get("u3").version == 4
    store.delete("u1")
    assert store.put_many([of("u1")]) == 1
    assert store.get("u1").version == 5
    assert store.put(of("u2", 0.9)).version == 2


def test_pages_are_in_the_order_of_code_points(store: ProfileStore) -> None:
    users = ["B", "a", "_", "Z", "z", "é", "ä", "A", "a b", "a_b", "a-b", "😀", "\uffee", "10", "9", "\x01"]
    store.put_many(of(user, 0.1) for user in users)
    for user in users[::2]:
        store.put(of(user, 0.2))
    ordered = sorted(users)
    assert [each.profile.user for each in store.page()] == ordered
    assert [each.profile.user for each in store.all()] == ordered
    assert [each.profile.user for each in store.page(after="a", limit=3)] == ordered[ordered.index("a") + 1 :][:3]
    assert store.page(after="😀") == []
    assert {each.profile.user: each.version for each in store.page()} == {
        user: 2 if user in users[::2] else 1 for user in users
    }
    assert {each.profile.weights["friendly"] for each in store.page() if each.version == 2} == {0.2}


def test_all_goes_on_from_page_to_page(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_PAGE", 3)
    monkeypatch.setattr(imports, "_BATCH", 4)
    users = [f"u{number:02d}" for number in range(10)]
    counts: list[int] = []
    assert store.put_many((of(user) for user in reversed(users)), on_done=counts.append) == 10
    assert counts == [4, 8, 10]
    assert [each.profile.user for each in store.all()] == users


def test_an_import_writes_all_or_nothing(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_BATCH", 2)
    store.put(of("u2", 0.1))
    before = list(store.all())

    def broken() -> object:
        yield from (of(f"u{number}") for number in range(7))
        raise DeclarationError("line 8 is at fault", where="users.jsonl:8", mend="mend it")

    with pytest.raises(DeclarationError, match="line 8"):
        store.put_many(broken())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the user 'u1' has two profiles"):
        store.put_many([of("u1"), of("u2"), of("u3"), of("u1")])
    with pytest.raises(DeclarationError, match="NUL"):
        store.put_many([of("u1"), of("u\0")])
    assert list(store.all()) == before
    assert store.put_many([]) == 0
    assert store.put_many([of("u1"), of("u2", 0.2), of("u3")]) == 3
    assert [each.version for each in store.history("u2")] == [1, 2]


def test_what_the_check_refuses_is_not_written(where: str) -> None:
    def check(profile: Profile) -> None:
        if profile.weights["friendly"] > 1:
            raise DeclarationError("too friendly", where=profile.place("weights"), mend="1 at most")

    with ProfileStore.open(where, check=check) as store:
        store.put(of("u1"))
        with pytest.raises(DeclarationError, match="too friendly"):
            store.put(of("u1", 2))
        with pytest.raises(DeclarationError, match="too friendly"):
            store.put_many([of("u0"), of("u1", 2)])
        assert [each.version for each in store.all()] == [1]


@pytest.mark.parametrize("user", TRICKS)
def test_any_text_is_a_name(store: ProfileStore, user: str) -> None:
    store.put(of("a neighbour"))
    written = store.put(of(user))
    assert store.get(user) == written
    assert store.get(user).profile.user == user
    assert store.history(user) == [written]
    assert user in [each.profile.user for each in store.all()]
    store.delete(user)
    assert [each.profile.user for each in store.all()] == ["a neighbour"]


@pytest.mark.parametrize(
    ("user", "what"),
    [
        ("", "is empty"),
        ("a\0b", "contains NUL"),
        ("\ud800", "half of a surrogate pair"),
        ("x" * (MAX_USER_BYTES + 1), f"takes {MAX_USER_BYTES + 1} bytes"),
        ("😀" * (MAX_USER_BYTES // 4 + 1), f"takes {MAX_USER_BYTES + 4} bytes"),
    ],
)
def test_what_is_no_name_is_refused_before_the_database_is_asked(store: ProfileStore, user: str, what: str) -> None:
    for ask in (store.get, store.history, store.delete):
        with pytest.raises(DeclarationError, match=what):
            ask(user)
    profile = of("u").model_copy(update={"user": user})
    with pytest.raises(DeclarationError, match=what):
        store.put(profile)
    with pytest.raises(DeclarationError, match=what):
        store.put_many([profile])


def test_the_longest_names_are_kept(store: ProfileStore) -> None:
    for user in ("x" * MAX_USER_BYTES, "😀" * (MAX_USER_BYTES // 4)):
        assert store.put(of(user)) == store.get(user)


def test_half_a_surrogate_pair_in_an_experts_name_is_refused(store: ProfileStore) -> None:
    with pytest.raises(DeclarationError, match="surrogate"):
        store.put(Profile(user="u", weights={"\ud800": 1.0}))
    assert list(store.all()) == []


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user=NAMES, weights=WEIGHTS, several=st.booleans())
def test_names_and_weights_come_back_to_the_bit(
    store: ProfileStore, user: str, weights: dict[str, float], several: bool
) -> None:
    profile = Profile(user=user, weights=weights)
    if several:
        store.put_many([profile])
    else:
        store.put(profile)
    got = store.get(user).profile
    assert got == profile
    assert [(name, value.hex()) for name, value in got.weights.items()] == [
        (name, value.hex()) for name, value in weights.items()
    ]
    assert store.page(after=user[:-1], limit=10_000)


def test_export_and_import_give_the_same(where: str, store: ProfileStore, tmp_path: Path) -> None:
    store.put_many(of(user, number / 7) for number, user in enumerate(TRICKS))
    with ProfileStore.open(tmp_path / "other.db") as other:
        assert other.put_many(each.profile for each in store.all()) == len(TRICKS)
        assert [each.profile for each in other.all()] == [each.profile for each in store.all()]
    assert store.put_many(each.profile for each in store.all()) == 0


def test_a_store_is_there_when_it_is_opened_again(where: str) -> None:
    with pytest.raises(UsageError, match=r"the file does not exist|contains no profile store"):
        ProfileStore.open(where, create=False)
    with ProfileStore.open(where) as store:
        written = store.put(of("u1"))
    with ProfileStore.open(where, create=False) as store:
        assert store.get("u1") == written


def test_a_newer_schema_is_refused(where: str) -> None:
    from sqlalchemy import text

    with ProfileStore.open(where) as store, store._database.engine.connect() as connection:
        connection.execute(text("UPDATE psoups_store SET schema = 3"))
        connection.commit()
        with pytest.raises(FileFormatError, match="schema 3"):
            store.check_reachable()
    with pytest.raises(FileFormatError, match=r"has schema 3, but this version .* supports schemas 1 to 2"):
        ProfileStore.open(where)


def test_a_document_of_a_newer_version_is_told_with_its_user(store: ProfileStore) -> None:
    from sqlalchemy import text

    store.put(of("u1"))
    with store._database.engine.connect() as connection:
        document = json.dumps({"method": "new", "weights": {"a": 1}})
        connection.execute(text("UPDATE psoups_profiles SET document = :document"), {"document": document})
        connection.commit()
    with pytest.raises(
        FileFormatError, match="version 1 of 'u1' is not a valid profile: 'new' is not a known merge method"
    ):
        store.get("u1")


def test_faults_are_passed_over_and_told_where_that_is_asked_for(where: str) -> None:
    def check(profile: Profile) -> None:
        if "bad" in profile.weights:
            raise DeclarationError("no such expert", where=profile.user, mend="take another")

    errors: list[str] = []
    profiles = [of("u1"), Profile(user="u2", weights={"bad": 1.0}), of("u\0"), of("u1", 2), of("u2", 3), of("u3")]
    with ProfileStore.open(where, check=check) as store:
        written = store.put_many(profiles, on_bad=lambda error: errors.append(error.what))
        # the first profile of u2 was no good: the second one is not its double
        assert [(each.profile.user, each.profile) for each in store.all()] == [
            (user, profile) for user, profile in (("u1", profiles[0]), ("u2", profiles[4]), ("u3", profiles[5]))
        ]
    assert written == 3
    assert errors == ["no such expert", "the user's name 'u\\x00' contains NUL", "the user 'u1' has two profiles"]


def test_a_search_finds_names_that_contain_a_text(store: ProfileStore) -> None:
    names = [*TRICKS, "Ada", "adam", "x_ada_y", "a%b", "a_b", "a\\b", "aXb", "ÉTÉ", "été"]
    store.put_many(of(user) for user in names)

    def lowered(text: str) -> str:
        return "".join(chr(ord(each) + 32) if "A" <= each <= "Z" else each for each in text)

    for text in ["ada", "ADA", "%", "_", "\\", "a_", "été", "É", "xb", "none of them", "'", "\n", "😀", *TRICKS]:
        found = [each.profile.user for each in store.page(search=text, limit=1000)]
        assert found == sorted(name for name in set(names) if lowered(text) in lowered(name)), text
    assert [each.profile.user for each in store.page(search="ada", after="Ada", limit=1)] == ["adam"]
    assert store.page(search="ada", after="x_ada_y") == []


def test_what_no_name_can_hold_is_found_nowhere(store: ProfileStore) -> None:
    store.put(of("u1"))
    for odd in ("\0", "a\0", "\ud800"):
        assert store.page(search=odd) == []
    for after in ("\0", "u\0", "u0\0z"):
        assert [each.profile.user for each in store.page(after=after)] == ["u1"]
    assert store.page(after="u1\0") == []
    with pytest.raises(DeclarationError, match="not Unicode text"):
        store.page(after="\ud800")


# SQLite's files


def test_the_file_is_made_with_the_modes_of_the_umask(tmp_path: Path, umask_022: None) -> None:
    path = tmp_path / "a folder #1?%20" / "profiles&mode=ro.db"
    path.parent.mkdir()
    with ProfileStore.open(path) as store:
        store.put(of("u1"))
        assert path.stat().st_mode & 0o777 == 0o644
        assert Path(f"{path}-wal").stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(path.parent)) == [path.name]  # noqa: PTH208
    os.umask(0o077)
    with ProfileStore.open(tmp_path / "mine.db"):
        assert (tmp_path / "mine.db").stat().st_mode & 0o777 == 0o600


def test_paths_and_urls_name_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ProfileStore.open("profiles.db") as store:
        written = store.put(of("u1"))
    for where in ("sqlite:///profiles.db", f"sqlite:///{tmp_path}/profiles.db", tmp_path / "profiles.db"):
        with ProfileStore.open(where, create=False) as store:
            assert store.get("u1") == written
    (tmp_path / "link.db").symlink_to("profiles.db")
    with ProfileStore.open("link.db", create=False) as store:
        assert store.get("u1") == written


def test_files_of_others_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE accounts (name TEXT)")
    connection.commit()
    connection.close()
    (tmp_path / "text.db").write_text("not a database at all\n" * 100)
    for name, what in (
        ("foreign.db", "not a profile store: it contains the table 'accounts'"),
        ("text.db", "is not a SQLite database"),
    ):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(FileFormatError, match=what):
            ProfileStore.open(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(FileFormatError, match="the path is not a regular file"):
        ProfileStore.open(tmp_path)
    with pytest.raises(UsageError, match="No such file or directory"):
        ProfileStore.open(tmp_path / "missing" / "profiles.db")
    (tmp_path / "dangling.db").symlink_to("nowhere/profiles.db")
    with pytest.raises(StoreUnavailable):
        ProfileStore.open(tmp_path / "dangling.db")


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    with ProfileStore.open(path) as store:
        store.put_many(of(f"u{number}") for number in range(2000))
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(byte ^ 0x5A for byte in data[4096:])
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="damaged"), ProfileStore.open(path) as store:
        list(store.all())


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:secret@h/d",
        "sqlite://",
        "sqlite:///:memory:",
        "http://u:secret@h",
        "postgresql://u:secret@h:port/d",
        "nosuch+x://secret",
    ],
)
def test_other_urls_are_refused_without_telling_their_password(url: str) -> None:
    with pytest.raises(UsageError) as error:
        ProfileStore.open(url)
    assert "secret" not in str(error.value)
    assert "sqlite:///profiles.db" in error.value.mend


# PostgreSQL's URLs


def test_every_spelling_of_postgres_is_understood(postgres_url: str) -> None:
    with ProfileStore.open(postgres_url) as store:
        written = store.put(of("u1"))
    for spelling in ("postgres", "postgresql+psycopg"):
        with ProfileStore.open(postgres_url.replace("postgresql", spelling, 1)) as store:
            assert store.get("u1") == written


def test_a_server_that_is_not_there_is_told_without_the_password() -> None:
    with pytest.raises(StoreUnavailable, match="does not answer") as error:
        ProfileStore.open("postgresql://me:secret@127.0.0.1:9/psoups")
    assert "secret" not in str(error.value)
    assert "127.0.0.1:9/psoups" in error.value.where


def test_a_database_of_another_encoding_is_refused(postgres_url: str) -> None:
    from sqlalchemy import create_engine, text

    engine = create_engine(postgres_url.replace("postgresql", "postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS latin"))
        connection.execute(text("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"))
    engine.dispose()
    with pytest.raises(UsageError, match="LATIN1"):
        ProfileStore.open(postgres_url.replace("/psoups?", "/latin?"))


def test_errors_say_what_where_and_the_mend(store: ProfileStore) -> None:
    with pytest.raises(SoupError) as error:
        store.get("u1", 3)
    assert "no version 3" in error.value.what
    assert "psoups profile history" in error.value.mend
    assert error.value.where == store._database.where
