"""Old answers are deleted while the server runs, and answers are never logged."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.retention import Retention
from personalized_soups.serving.web.settings import Settings
from personalized_soups.users.profiles.store import ProfileStore, StoreUnavailable
from tests.serving.servers import running
from tests.serving.web.routes.pools import pool_of
from tests.users.profiles.evidence import answered

DAY = timedelta(days=1)

# The texts of the questions of `pool_of`.
TEXTS = re.compile(r"Prompt \d+\?|First \d+\.|Second \d+\.")


def test_old_answers_are_deleted_when_the_server_starts(small_base: Path, expert_folders: Path, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        for question, age in (("old", 31 * DAY), ("young", 29 * DAY)):
            store.answers.add("ada", answered(question, answered_at=now - age))
    settings = Settings("small", limits=Limits(max_context=256), answer_retention=30 * DAY)
    with running(small_base, expert_folders, settings, profiles=tmp_path / "profiles.db") as served:
        assert served.store is not None
        answers = served.store.answers
        served.wait_until(lambda: answers.count("ada") < 2)
        assert [each.question.id for each in answers.of("ada")] == ["young"]


class _Ended(Exception):  # noqa: N818
    """Ends an endless loop."""


def test_old_answers_are_deleted_again_and_again(tmp_path: Path) -> None:
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        waited: list[float] = []

        async def sleep(seconds: float) -> None:
            """Add an old answer in each pause; end in the third one."""
            waited.append(seconds)
            assert store.answers.count("ada") == 1, "the old answer was not deleted"
            if len(waited) == 3:
                raise _Ended
            store.answers.add("ada", answered(f"q{len(waited)}", answered_at=datetime.now(UTC) - 9 * DAY))

        store.answers.add("ada", answered("young"))
        store.answers.add("ada", answered("q0", answered_at=datetime.now(UTC) - 9 * DAY))
        with pytest.raises(_Ended):
            asyncio.run(Retention(store.answers, 8 * DAY, sleep=sleep).run())
        assert waited == [3600.0] * 3


@pytest.mark.parametrize(("keep", "seconds"), [(timedelta(minutes=5), 60), (12 * timedelta(hours=1), 1800), (DAY, 3600),
                                               (365 * DAY, 3600)])  # fmt: skip
def test_short_times_are_checked_more_often(tmp_path: Path, keep: timedelta, seconds: float) -> None:
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        assert Retention(store.answers, keep).seconds == seconds


def test_a_store_that_cannot_be_reached_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        store.answers.add("ada", answered("q0", answered_at=datetime.now(UTC) - 9 * DAY))
        expire = store.answers.expire
        faults: list[Exception] = [StoreUnavailable("gone", where="db", mend="wait"), ZeroDivisionError()]

        def failing(before: datetime) -> int:
            if faults:
                raise faults.pop(0)
            return expire(before)

        num_pauses = 0

        async def sleep(_: float) -> None:
            nonlocal num_pauses
            num_pauses += 1
            if num_pauses == 3:
                raise _Ended

        monkeypatch.setattr(store.answers, "expire", failing)
        with caplog.at_level(logging.ERROR), pytest.raises(_Ended):
            asyncio.run(Retention(store.answers, DAY, sleep=sleep).run())
        assert [record.message for record in caplog.records] == [
            "old answers cannot be deleted now: gone (db)",
            "old answers cannot be deleted",
        ]
        assert store.answers.count("ada") == 0


def test_neither_logs_nor_metrics_contain_the_texts_of_answers(
    small_base: Path,
    expert_folders: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every logger writes all that it can, and requests succeed, fail, and meet a damaged store."""
    path = tmp_path / "profiles.db"
    settings = Settings(
        "small", limits=Limits(max_context=256), users_in_metrics=True, answer_retention=DAY, answers_per_minute=1000
    )
    where = "/v1/profiles/ada/questions"
    pool = pool_of(expert_folders)
    with (
        caplog.at_level(logging.DEBUG),
        caplog.at_level(logging.DEBUG, "sqlalchemy"),  # it does not follow the root's level
        running(small_base, expert_folders, settings, profiles=path, pool=pool) as served,
    ):
        assert served.store is not None
        state = served.ask("GET", where).json
        shown: list[str] = []
        while not state["done"]:
            shown += [state["question"]["prompt"], *state["question"]["answers"]]
            body = {"question": state["question"]["id"], "choice": "first"}
            served.ask("POST", where, {**body, "choice": "all of them"})  # refused
            state = served.ask("POST", where, body).json
        assert len(shown) == 30
        assert all(TEXTS.fullmatch(text) for text in shown)
        assert served.ask("POST", f"{where}/finish").status == 201
        assert served.ask("DELETE", f"{where}/last").status == 200
        metrics = served.ask("GET", "/metrics").body.decode()
        # a document that no version of the package can read, and a table that is gone
        connection = sqlite3.connect(path)
        connection.execute("UPDATE psoups_answers SET document = replace(document, 'choice', 'choices')")
        connection.commit()
        assert served.ask("GET", where).status == 503
        connection.execute("ALTER TABLE psoups_answers RENAME TO elsewhere")
        connection.commit()
        connection.close()
        assert served.ask("GET", where).status == 503
        assert served.ask("POST", where, body).status == 503
    printed = capfd.readouterr()
    assert "profile store cannot be used" in caplog.text
    assert 'psoups_requests_total{route="/v1/profiles/{user:any}/questions",status="200"}' in metrics
    for text in (caplog.text, metrics, printed.out, printed.err):
        assert TEXTS.findall(text) == []
    assert len(caplog.records) > 2
