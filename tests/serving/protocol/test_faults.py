"""What clients are told of faults: status, type, code and headers, and nothing of what is nobody's business."""

from __future__ import annotations

import json
from typing import Any

import pytest

from personalized_soups.errors import FileFormatError, InputError, RunError, SoupError, UsageError
from personalized_soups.serving.engine.queue import ClosedError, QueueFullError
from personalized_soups.serving.protocol.expert_files import ExpertsChangedError
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.users.profiles.failures import StoreFull, StoreUnavailable, UnknownProfile, VersionConflict

TOLD: dict[str, Any] = {"where": "/secret/place", "mend": "do that"}


@pytest.mark.parametrize(
    ("fault", "status", "kind", "code"),
    [
        (QueueFullError("full", **TOLD), 429, "rate_limit_error", "queue_full"),
        (ClosedError("closed", **TOLD), 503, "server_error", "shutting_down"),
        (ExpertsChangedError("changed", **TOLD), 503, "server_error", "experts_changed"),
        (StoreUnavailable("gone", **TOLD), 503, "server_error", "store_unavailable"),
        (FileFormatError("odd", **TOLD), 503, "server_error", "store_unavailable"),
        (StoreFull("full", **TOLD), 507, "server_error", "store_full"),
        (VersionConflict("late", **TOLD), 412, "invalid_request_error", "version_conflict"),
        (UnknownProfile("nobody", **TOLD), 404, "not_found_error", "profile_not_found"),
        (RunError("broke", **TOLD), 500, "server_error", "run_failed"),
        (ValueError("/secret/place"), 500, "server_error", "internal_error"),
    ],
)
def test_each_fault_has_its_status_and_tells_no_place(fault: Exception, status: int, kind: str, code: str) -> None:
    told = api_error(fault)
    error = told.body()["error"]
    assert (told.status, error["type"], error["code"]) == (status, kind, code)
    assert "secret" not in error["message"]
    assert json.loads(bytes(told.response().body)) == told.body()


@pytest.mark.parametrize("kind", [UsageError, InputError])
def test_what_the_client_gave_is_told_with_its_place_and_mend(kind: type[SoupError]) -> None:
    told = api_error(kind("7 is odd", where="weights.warm", mend="write 8"), param="profile", status=422)
    assert (told.status, told.param, told.code) == (422, "profile", "invalid_value")
    assert told.message == "weights.warm: 7 is odd; write 8"
    assert told.body()["error"]["type"] == "invalid_request_error"


def test_a_conflict_tells_the_version_that_there_is() -> None:
    assert api_error(VersionConflict("late", **TOLD, current=7)).headers == {"ETag": '"7"'}
    assert api_error(VersionConflict("late", **TOLD)).headers == {}


def test_when_to_come_back_is_told() -> None:
    assert api_error(QueueFullError("full", **TOLD), retry_after=9).headers == {"Retry-After": "9"}
    assert api_error(QueueFullError("full", **TOLD), retry_after=9).response().headers["retry-after"] == "9"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "authentication_error"), (403, "permission_error"), (404, "not_found_error"), (429, "rate_limit_error"),
     (499, "invalid_request_error"), (500, "server_error"), (504, "server_error")],
)  # fmt: skip
def test_types_are_those_of_the_protocol(status: int, kind: str) -> None:
    fault = ApiError(status, "what")
    assert fault.body() == {"error": {"message": "what", "type": kind, "param": None, "code": None}}
    assert api_error(fault) is fault
