"""The errors that clients receive: status, type, code and headers, without paths of the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from personalized_soups.errors import FileFormatError, InputError, RunError, SoupError, UsageError
from personalized_soups.serving.engine.queue import ClosedError, QueueFullError
from personalized_soups.serving.protocol.expert_files import ExpertsChangedError
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.users.profiles.failures import (
    AnsweredOtherwise,
    AnswersChanged,
    StoreFull,
    StoreUnavailable,
    UnknownProfile,
    VersionConflict,
)

PLACE: dict[str, Any] = {"where": "/secret/place", "mend": "do that"}


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (QueueFullError("full", **PLACE), 429, "rate_limit_error", "queue_full"),
        (ClosedError("closed", **PLACE), 503, "server_error", "shutting_down"),
        (ExpertsChangedError("changed", **PLACE), 503, "server_error", "experts_changed"),
        (StoreUnavailable("gone", **PLACE), 503, "server_error", "store_unavailable"),
        (FileFormatError("odd", **PLACE), 503, "server_error", "store_unavailable"),
        (StoreFull("full", **PLACE), 507, "server_error", "store_full"),
        (VersionConflict("late", **PLACE), 412, "invalid_request_error", "version_conflict"),
        (AnswersChanged("more", **PLACE, current=4), 409, "invalid_request_error", "answers_changed"),
        (AnsweredOtherwise("other", **PLACE), 409, "invalid_request_error", "answered_otherwise"),
        (UnknownProfile("nobody", **PLACE), 404, "not_found_error", "profile_not_found"),
        (RunError("broke", **PLACE), 500, "server_error", "run_failed"),
        (ValueError("/secret/place"), 500, "server_error", "internal_error"),
    ],
)
def test_each_error_has_its_status_and_names_no_path(error: Exception, status: int, kind: str, code: str) -> None:
    received = api_error(error)
    body = received.body()["error"]
    assert (received.status, body["type"], body["code"]) == (status, kind, code)
    assert "secret" not in body["message"]
    assert json.loads(bytes(received.response().body)) == received.body()


@pytest.mark.parametrize("kind", [UsageError, InputError])
def test_an_error_in_the_clients_input_has_its_place_and_fix(kind: type[SoupError]) -> None:
    received = api_error(kind("7 is odd", where="weights.warm", mend="write 8"), param="profile", status=422)
    assert (received.status, received.param, received.code) == (422, "profile", "invalid_value")
    assert received.message == "weights.warm: 7 is odd; write 8"
    assert received.body()["error"]["type"] == "invalid_request_error"


def test_a_conflict_has_the_current_version() -> None:
    assert api_error(VersionConflict("late", **PLACE, current=7)).headers == {"ETag": '"7"'}
    assert api_error(VersionConflict("late", **PLACE)).headers == {}


def test_a_full_queue_has_a_retry_after_header() -> None:
    assert api_error(QueueFullError("full", **PLACE), retry_after=9).headers == {"Retry-After": "9"}
    assert api_error(QueueFullError("full", **PLACE), retry_after=9).response().headers["retry-after"] == "9"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "authentication_error"), (403, "permission_error"), (404, "not_found_error"), (429, "rate_limit_error"),
     (499, "invalid_request_error"), (500, "server_error"), (504, "server_error")],
)  # fmt: skip
def test_types_are_those_of_the_protocol(status: int, kind: str) -> None:
    error = ApiError(status, "what")
    assert error.body() == {"error": {"message": "what", "type": kind, "param": None, "code": None}}
    assert api_error(error) is error


def test_changed_experts_have_a_retry_after_header() -> None:
    error = api_error(ExpertsChangedError("changed", where="experts", mend="reload them"), retry_after=9)
    assert (error.message, error.headers) == ("changed; reload them", {"Retry-After": "5"})
