"""`psoups serve`: serve one base to many users, with an API and a page with sliders."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli.bases import LoadOptions, checked_dtype
from personalized_soups.cli.options import (
    BaseOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    ExpertsOption,
    OnOption,
    SameBaseOption,
    ServedQuestionsOption,
    ServedStoreOption,
)
from personalized_soups.cli.serve.profile_answers import MAX_DAYS
from personalized_soups.cli.serve.server_run import HOST, PORT, ServedFiles, ServerRun, served_name, started_with
from personalized_soups.errors import UsageError, check_extra
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import Rules, Settings

_DEFAULTS = Settings(base="")
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="serve")(serve)


def serve(
    *,
    base: BaseOption,
    on: OnOption = None,
    experts: ExpertsOption,
    profiles: ServedStoreOption = None,
    questions: ServedQuestionsOption = None,
    num_questions: Annotated[
        int, typer.Option(min=1, help="Maximum number of questions that a user is asked.")
    ] = _DEFAULTS.num_questions,
    certainty: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=1.0,
            help="Stop asking when this share of a user's preferences is expected to be predicted correctly.",
        ),
    ] = None,
    answers_per_minute: Annotated[
        int, typer.Option(min=1, help="Maximum number of answers to questions that a user may send in a minute.")
    ] = _DEFAULTS.answers_per_minute,
    host: Annotated[
        str, typer.Option(help="Address to listen on. An address that is not a loopback address requires API keys.")
    ] = HOST,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. With 0, a free port is chosen.")
    ] = PORT,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of API keys that only you can read (chmod 600): one per line, KEY or KEY user=NAME."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Model name of the base, instead of the name of its folder.")] = None,
    dimensions: DimensionsOption = None,
    max_rows: Annotated[
        int, typer.Option(min=1, help="Maximum number of answers in a batch.")
    ] = _DEFAULTS.limits.max_rows,
    max_waiting: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of waiting answers. Further answers are rejected with status 429."),
    ] = _DEFAULTS.limits.max_waiting,
    max_requests: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of requests served at once. Further requests are rejected with status 429."
        ),
    ] = _DEFAULTS.rules.max_requests,
    max_context: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum tokens of a prompt and its answer together, instead of the base's limit."),
    ] = None,
    default_max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of an answer, in tokens, if a chat sets no limit.")
    ] = _DEFAULTS.default_max_tokens,
    read_tokens: Annotated[
        int, typer.Option(min=16, help="Prompt tokens processed between two steps of the running answers.")
    ] = _DEFAULTS.limits.read_tokens,
    cache_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB of memory for cached keys and values, instead of half of the free memory."),
    ] = None,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="Maximum size of a request body, in MiB.")
    ] = _DEFAULTS.rules.max_body / 2**20,
    request_timeout: Annotated[
        float, typer.Option(min=1.0, help="Maximum time of a request, in seconds.")
    ] = _DEFAULTS.request_seconds,
    grace: Annotated[
        float, typer.Option(min=1.0, help="Seconds that running answers may take after the server is asked to stop.")
    ] = _DEFAULTS.grace_seconds,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that clients may use for the server. May be repeated. * allows any name."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of another site whose pages may send requests. May be repeated."),
    ] = None,
    answer_retention: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=MAX_DAYS,
            metavar="DAYS",
            help="Delete users' answers to questions when they are older than DAYS days, instead of keeping them.",
        ),
    ] = None,
    users_in_metrics: Annotated[
        bool, typer.Option("--users-in-metrics", help="Count per user in /metrics. This makes the user names visible.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    same_base: SameBaseOption = False,
) -> None:
    """Serve one base to many users through OpenAI's API. Each answer has its own soup (weighted sum of experts).

    The model name is soup:USER for a stored profile, soup:USER@7 for its version 7, and the base's own name for the
    base. A request can also contain a profile: {"model": BASE, "profile": {"weights": {"friendly": 0.6}}, ...}. The
    page with sliders is at /playground. Ctrl-C stops the server after the running answers are finished.
    """
    check_extra("serve", "fastapi", "uvicorn", "prometheus_client", "sqlalchemy")
    _check_retention(answer_retention, profiles)
    loading = LoadOptions(base, device, checked_dtype(dtype), same_base, on)
    settings = Settings(
        base=name or served_name(base),
        rules=_rules(host, allow_host, cors_origin, max_body=max_body, max_requests=max_requests),
        limits=Limits(max_rows=max_rows, max_waiting=max_waiting, read_tokens=read_tokens),
        default_max_tokens=default_max_tokens,
        request_seconds=request_timeout,
        grace_seconds=grace,
        num_questions=num_questions,
        certainty=_checked_certainty(certainty),
        answers_per_minute=answers_per_minute,
        answer_retention=None if answer_retention is None else timedelta(days=answer_retention),
        users_in_metrics=users_in_metrics,
        started_with=started_with(base, experts, on),
    )
    files = ServedFiles(experts, profiles, questions, dimensions, api_key_file)
    ServerRun(loading, files, settings, host=host, port=port, max_context=max_context, cache_memory=cache_memory).run()


def _checked_certainty(certainty: float | None) -> float | None:
    """Return `certainty`.

    Raises:
        UsageError: if it is 0.5, which is reached by guessing.
    """
    if certainty == 0.5:
        raise UsageError(
            "a certainty of 0.5 is reached without any question",
            where="--certainty",
            mend="give a number above 0.5 and at most 1, e.g. --certainty 0.9",
        )
    return certainty


def _check_retention(answer_retention: float | None, profiles: str | None) -> None:
    if answer_retention is not None and profiles is None:
        raise UsageError(
            "no answers are stored, because --profiles is not given",
            where="--answer-retention",
            mend="give the store as well, e.g. --profiles profiles.db, or remove --answer-retention",
        )


def _rules(
    host: str, allow_host: list[str] | None, cors_origin: list[str] | None, *, max_body: float, max_requests: int
) -> Rules:
    """Return the rules for accepting requests, without the API keys. `max_body` is in MiB.

    Raises:
        UsageError: if an entry of `cors_origin` is neither `*` nor a valid origin.
    """
    origins = cors_origin or ()
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"{origin!r} is not a valid origin: an origin is a scheme and a host, without a path",
                where="--cors-origin",
                mend="give an origin, e.g. --cors-origin https://app.example.com",
            )
    hosts = [name.lower() for name in (host, *(allow_host or ()))]
    return Rules(hosts=hosts, origins=origins, max_body=round(max_body * 2**20), max_requests=max_requests)
