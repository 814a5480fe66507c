"""A database that goes away and comes back, a full disk, and writers that are killed: nothing is lost."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event

from personalized_soups.declare.profile import Profile
from personalized_soups.errors import FileFormatError
from personalized_soups.users.profiles.store import ProfileStore, StoredProfile, StoreFull, StoreUnavailable
from tests.users.profiles.old_schema import make_old_store
from tests.users.profiles.postgres import Server
from tests.users.profiles.test_concurrent import start
from tests.users.profiles.writers import profile_of


def test_a_server_that_comes_back_is_found_again(server: Server, postgres_url: str) -> None:
    with ProfileStore.open(postgres_url) as store:
        written = store.put(profile_of("u1", 1))
        with ThreadPoolExecutor(4) as pool:  # several connections
            assert list(pool.map(lambda _: store.get("u1"), range(40))) == [written] * 40
        server.stop()
        try:
            for ask in (
                lambda: store.get("u1"),
                lambda: store.put(profile_of("u1", 2)),
                lambda: store.put_many([profile_of("u1", 2)]),
                lambda: store.delete("u1"),
                store.page,
                store.check_reachable,
            ):
                with pytest.raises(StoreUnavailable, match="does not answer"):
                    ask()
        finally:
            server.start()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: store.get("u1"), range(40))) == [written] * 40
        assert store.put(profile_of("u1", 2)).version == 2


def test_a_server_that_stops_during_an_import_leaves_nothing_of_it(server: Server, postgres_url: str) -> None:
    with ProfileStore.open(postgres_url) as store:
        written = store.put(profile_of("u1", 1))

        def profiles() -> Iterator[Profile]:
            for number in range(6000):
                yield profile_of(f"u{number}", 2)
            server.stop()

        try:
            with pytest.raises(StoreUnavailable):
                store.put_many(profiles())
        finally:
            server.start()
        assert list(store.all()) == [written]


def test_a_role_that_may_not_upgrade_the_tables_is_told(postgres_url: str) -> None:
    make_old_store(postgres_url)
    engine = create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE clerk LOGIN")
        connection.exec_driver_sql("GRANT SELECT, INSERT, UPDATE, DELETE ON psoups_profiles, psoups_store TO clerk")
    engine.dispose()
    with ProfileStore.open(postgres_url.replace("tests@", "clerk@")) as store:
        assert store.get("ada").version == 8
        with pytest.raises(StoreUnavailable, match="refuses this to the role in the URL") as error:
            store.put(profile_of("ada", 1))
        assert "only the owner can upgrade them" in error.value.mend
        with ProfileStore.open(postgres_url) as owner:
            owner.put(profile_of("bob", 1))
        assert store.put(profile_of("ada", 1)).version == 9


def test_a_file_that_comes_back_is_found_again_and_never_made_anew(tmp_path: Path) -> None:
    path, away = tmp_path / "profiles.db", tmp_path / "away.db"
    with ProfileStore.open(path) as store:
        written = store.put(profile_of("u1", 1))
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: store.get("u1"), range(40))) == [written] * 40
        path.rename(away)
        for ask in (
            lambda: store.get("u1"),
            lambda: store.put(profile_of("u1", 2)),
            lambda: store.put_many([profile_of("u1", 2)]),
            lambda: store.delete("u1"),
            store.page,
            store.check_reachable,
        ):
            with pytest.raises(StoreUnavailable, match="cannot be used: unable to open"):
                ask()
            assert not path.exists()
        away.rename(path)
        assert store.get("u1") == written
        assert store.put(profile_of("u1", 2)).version == 2
    with ProfileStore.open(path, create=False) as store:
        assert [each.version for each in store.history("u1")] == [1, 2]


def test_a_file_that_another_one_has_replaced_is_read(tmp_path: Path) -> None:
    with ProfileStore.open(tmp_path / "new.db") as other:
        other.put(profile_of("new", 1))
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        store.put(profile_of("old", 1))
        for ending in ("-wal", "-shm"):
            Path(f"{tmp_path}/profiles.db{ending}").unlink()
        (tmp_path / "new.db").replace(tmp_path / "profiles.db")
        assert [each.profile.user for each in store.all()] == ["new"]
        (tmp_path / "profiles.db").write_text("something else")
        with pytest.raises(FileFormatError, match=r"damaged|no longer contains a profile store"):
            store.get("new")


def limit_pages(store: ProfileStore, num_pages: int) -> None:
    """Let SQLite's file have no more pages than it has, and so many: it says then that the disk is full."""
    engine = store._database.engine
    engine.dispose()

    def limit(connection: Any, _: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {num_pages}").close()

    event.listen(engine, "connect", limit)


def put_until_full(store: ProfileStore, written: list[StoredProfile]) -> None:
    written.extend(store.put(profile_of(f"u{number:05d}", 1)) for number in range(10_000))


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        limit_pages(store, 20)
        written: list[StoredProfile] = []
        with pytest.raises(StoreFull, match="disk is full") as full:
            put_until_full(store, written)
        assert len(written) > 100
        assert "the write was undone" in full.value.mend
        assert list(store.all()) == written
        with pytest.raises(StoreFull):
            store.put_many(profile_of(f"v{number}", 1) for number in range(5000))
        assert list(store.all()) == written
        limit_pages(store, 1_000_000)
        assert store.put_many(profile_of(f"v{number}", 1) for number in range(5000)) == 5000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no program mount")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_loses_nothing(small_disk: Path) -> None:
    path = small_disk / "profiles.db"
    with ProfileStore.open(path) as store:
        written = [store.put(profile_of("a", 1))]
        filler = small_disk / "filler"
        fill(filler)
        with pytest.raises(StoreFull):
            put_until_full(store, written)
        assert list(store.all()) == written
        with pytest.raises(StoreFull):
            store.put_many(profile_of(f"v{number}", 1) for number in range(5000))
        assert list(store.all()) == written
        with pytest.raises(StoreFull), ProfileStore.open(small_disk / "other.db") as other:
            other.put(profile_of("a", 1))
        filler.unlink()
        written.append(store.put(profile_of("z", 1)))
        assert list(store.all()) == written
    with ProfileStore.open(path) as store:
        assert list(store.all()) == written


@pytest.mark.slow
def test_a_killed_import_leaves_what_was_there_or_all_of_it(where: str) -> None:
    count = 8000
    with ProfileStore.open(where) as store:
        old = [store.put(profile_of(f"u{number:06d}", 1)) for number in range(0, count, 1000)]
        killed = 0
        for seconds in (0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 60):
            with start("bring_in", where, count) as process:
                assert process.stdout is not None
                assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "read\n"]
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                process.kill()
            found = list(store.all())
            if len(found) == count:
                break
            assert found == old
            killed += 1
        assert killed
        assert {each.profile.weights["friendly"] for each in found} == {2.0}
        assert [each.version for each in store.history("u000000")] == [1, 2]
        assert store.put(profile_of("after", 1)).version == 1
