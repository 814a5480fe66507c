"""Requests whose JSON is JSON: no NaN, no infinities, UTF-8; and what a client is told where they are not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from personalized_soups.errors import nearest
from personalized_soups.serving.protocol.faults import ApiError

# How pydantic says which of several types it tried.
_UNION_TAG = re.compile(r"str|[a-z-]+\[.*\]|constrained-.*")


class StrictRequest(Request):
    """A request that parses its body by the letter of RFC 8259."""

    async def json(self) -> Any:
        """Return what the body holds.

        Raises:
            JSONDecodeError: if it is no JSON.
        """
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = from_json(body, allow_inf_nan=False)
            except ValueError as fault:
                raise json.JSONDecodeError(str(fault), "", 0) from None
        return self._json


class StrictRoute(APIRoute):
    """A route whose requests are strict."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, given a StrictRequest."""
        usual = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await usual(StrictRequest(request.scope, request.receive))

        return handler


class BodyRoute(APIRoute):
    """A route whose endpoint takes what the body holds, and the request: `endpoint(asked, request)`, nothing else.

    FastAPI describes it; its general way of finding out what an endpoint wants takes as long as all the rest of taking
    up a request, and a crowd's requests are taken up one by one.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what parses the body and calls the endpoint."""
        assert self.body_field is not None
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]
        endpoint = self.endpoint

        async def handler(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(400, "the body is not said to be JSON; send Content-Type: application/json")
            try:
                content = from_json(await request.body(), allow_inf_nan=False)
            except ValueError as fault:
                raise ApiError(400, f"the body is no valid JSON: {fault}", code="invalid_json") from None
            try:
                asked = model.model_validate(content)
            except ValidationError as fault:
                raise RequestValidationError(fault.errors()) from None
            response: Response = await endpoint(asked, request)
            return response

        return handler


def validation_error(fault: RequestValidationError, known: Sequence[str]) -> ApiError:
    """Return what a client is told of a body that is not what the protocol wants.

    Args:
        fault: all that FastAPI found; the first is told.
        known: parameters that there are, for the nearest name.
    """
    errors = fault.errors()
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    place = [
        part
        for part in map(str, first["loc"])
        if part not in {"body", "path", "query", "header"} and not _UNION_TAG.fullmatch(part)
    ]
    if first["type"] == "unsupported" and "name" in first["ctx"]:  # found by the whole that it is a part of
        place.append(first["ctx"]["name"])
    param = ".".join(place) or None
    match first["type"]:
        case "json_invalid":
            why = first.get("ctx", {}).get("error", "")
            return ApiError(400, f"the body is no valid JSON: {why}", code="invalid_json")
        case "extra_forbidden":
            near = nearest(place[-1], known)
            mend = f"; did you mean {near!r}?" if near else ""
            return ApiError(
                400, f"Unrecognized request argument supplied: {param}{mend}", param=param, code="unknown_parameter"
            )
        case "missing":
            what = (
                f"you must provide {param!r}"
                if param
                else "the body is empty; send JSON (Content-Type: application/json)"
            )
            return ApiError(400, what, param=param, code="missing_required_parameter")
        case _:
            where = f" for {param!r}" if param else ""
            return ApiError(400, f"Invalid value{where}: {first['msg']}", param=param, code="invalid_value")
