"""Parses requests as strict JSON (no NaN, no infinities, valid UTF-8), and describes invalid requests."""

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

# Parts of a pydantic error's location that name a type pydantic tried, not a parameter.
_UNION_TAG = re.compile(r"str|[a-z-]+\[.*\]|constrained-.*")


class StrictRequest(Request):
    """A request whose body must be JSON as RFC 8259 defines it."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            JSONDecodeError: if the body is not valid JSON.
        """
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise json.JSONDecodeError(str(error), "", 0) from None
        return self._json


class StrictRoute(APIRoute):
    """A route that parses bodies with StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, wrapped so that it receives a StrictRequest."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handler


class BodyRoute(APIRoute):
    """A route that parses the body and calls `endpoint(body, request)`.

    FastAPI's own way of finding an endpoint's arguments is slow: it takes as long as all other work on a request before
    the request is queued. So FastAPI only describes the route in the OpenAPI schema.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that parses the body and calls the endpoint."""
        assert self.body_field is not None
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]
        endpoint = self.endpoint

        async def handler(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(400, "the Content-Type header must be application/json")
            try:
                content = from_json(await request.body(), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
            try:
                body = model.model_validate(content)
            except ValidationError as error:
                raise RequestValidationError(error.errors()) from None
            response: Response = await endpoint(body, request)
            return response

        return handler


def validation_error(error: RequestValidationError, known: Sequence[str]) -> ApiError:
    """Return the error to send to the client for an invalid request.

    Args:
        error: all faults of the request. The client is told the first unknown parameter if there is one, else the first
            fault.
        known: the parameters of the protocol. The most similar parameter is suggested for an unknown one.
    """
    errors = error.errors()
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    place = [
        part
        for part in map(str, first["loc"])
        if part not in {"body", "path", "query", "header"} and not _UNION_TAG.fullmatch(part)
    ]
    if first["type"] == "unsupported" and "name" in first["ctx"]:  # pydantic located the object that has the parameter
        place.append(first["ctx"]["name"])
    param = ".".join(place) or None
    match first["type"]:
        case "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
        case "extra_forbidden":
            near = nearest(place[-1], known)
            suggestion = f"; did you mean {near!r}?" if near else ""
            return ApiError(
                400,
                f"Unrecognized request argument supplied: {param}{suggestion}",
                param=param,
                code="unknown_parameter",
            )
        case "missing":
            message = (
                f"the request has no parameter {param!r}, which is required"
                if param
                else "the request body is empty; send JSON with the header Content-Type: application/json"
            )
            return ApiError(400, message, param=param, code="missing_required_parameter")
        case _:
            where = f" for {param!r}" if param else ""
            return ApiError(400, f"Invalid value{where}: {first['msg']}", param=param, code="invalid_value")
