"""`psoups serve`: one base for many users, behind an API and a page with sliders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import catalogue_of, checked_dtype, resolve_base
from personalized_soups.errors import UsageError, check_extra

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.serving.web.settings import Settings

PORT = 8000

# So long a client's write waits for others, such as an import.
_PATIENCE_SECONDS = 5.0
_ORIGIN = re.compile(r"https?://[^/?#\s]+")

Base = Annotated[str, typer.Option(help="Base model: a folder, a hub id, or tiny: the embedded one.")]
Experts = Annotated[list[Path], typer.Option(help="Folder of experts; may be repeated.")]
Profiles = Annotated[
    str | None,
    typer.Option(
        envvar="PSOUPS_PROFILES",
        help="The store of profiles: a SQLite file, made where there is none, or postgresql://USER@HOST/DATABASE.",
    ),
]
Dimensions = Annotated[
    Path | None, typer.Option(help="Your own preference catalogue: names and scorers; the shipped one if left out.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")]
SameBase = Annotated[bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="serve")(serve)


def serve(
    *,
    base: Base,
    experts: Experts,
    profiles: Profiles = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback's need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = PORT,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line, that only you may read (chmod 600).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the base as a model; its folder's if left out.")] = None,
    dimensions: Dimensions = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers that are made at once, in one batch.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused (429).")] = 1024,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once; more are refused (429).")] = 1024,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt with its answer; what the base can if left out.")
    ] = None,
    default_max_tokens: Annotated[
        int, typer.Option(min=1, help="An answer is cut there, where a chat says nothing.")
    ] = 512,
    read_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens of prompts that are read between two steps of running answers.")
    ] = 4096,
    cache_memory: Annotated[
        float | None, typer.Option(min=0.001, help="GiB for keys and values; half of what is free if left out.")
    ] = None,
    max_body: Annotated[float, typer.Option(min=0.001, help="MiB that a request's body may have.")] = 1.0,
    request_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[float, typer.Option(min=1.0, help="Seconds that running answers have when it is ended.")] = 30.0,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name that the server may be asked for by; may be repeated; * is any.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of pages elsewhere that may ask; may be repeated.")
    ] = None,
    users_in_metrics: Annotated[
        bool, typer.Option("--users-in-metrics", help="Count by user in /metrics, whose readers then see the names.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    same_base: SameBase = False,
) -> None:
    """Answer OpenAI's protocol with somebody's soup in every row of one batch.

    The model `soup:USER` is a stored profile, `soup:USER@7` its version 7, the base's own name the base; a profile of
    the moment goes with the request: {"model": BASE, "profile": {"weights": {"friendly": 0.6}}, ...}. The page with
    sliders is at /playground. Ctrl-C ends it, once the answers that are being made are done.
    """
    serve_asked(
        ServeOptions(
            base,
            experts,
            profiles=profiles,
            host=host,
            port=port,
            api_key_file=api_key_file,
            name=name,
            dimensions=dimensions,
            max_rows=max_rows,
            max_waiting=max_waiting,
            max_requests=max_requests,
            max_context=max_context,
            default_max_tokens=default_max_tokens,
            read_tokens=read_tokens,
            cache_memory=cache_memory,
            max_body=max_body,
            request_timeout=request_timeout,
            grace=grace,
            allow_host=allow_host or (),
            cors_origin=cors_origin or (),
            users_in_metrics=users_in_metrics,
            device=device,
            dtype=dtype,
            same_base=same_base,
        )
    )


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What is asked for on the command line; the options of `serve` say what each is."""

    base: str
    experts: Sequence[Path]
    _: KW_ONLY
    profiles: str | None = None
    host: str = "127.0.0.1"
    port: int = PORT
    api_key_file: Path | None = None
    name: str | None = None
    dimensions: Path | None = None
    max_rows: int = 64
    max_waiting: int = 1024
    max_requests: int = 1024
    max_context: int | None = None
    default_max_tokens: int = 512
    read_tokens: int = 4096
    cache_memory: float | None = None
    max_body: float = 1.0
    request_timeout: float = 600.0
    grace: float = 30.0
    allow_host: Sequence[str] = ()
    cors_origin: Sequence[str] = ()
    users_in_metrics: bool = False
    device: str = "auto"
    dtype: str = "auto"
    same_base: bool = False
    takes_any_port: bool = False
    opens_browser: bool = False


def serve_asked(asked: ServeOptions) -> None:
    """Load everything and answer requests until the end.

    Raises:
        SoupError: if something that is asked for is not there, or can't be.
    """
    check_extra("serve", "fastapi", "uvicorn", "prometheus_client", "sqlalchemy")
    held = checked_dtype(asked.dtype)
    for origin in asked.cors_origin:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UsageError(f"{origin!r} is no origin", where="--cors-origin", mend="write https://app.example.com")
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.serving.web.server import listen, load_model, read_keys, serve
    from personalized_soups.users.profiles.store import ProfileStore

    keys = [] if asked.api_key_file is None else read_keys(asked.api_key_file)
    catalogue = load(catalogue_of(asked.base, asked.dimensions), Catalogue)
    with ExitStack() as stack:
        listening = stack.enter_context(listen(asked.host, asked.port, has_key=bool(keys), or_any=asked.takes_any_port))
        render.say(f"loading {asked.base} ...")
        model, files = load_model(
            resolve_base(asked.base),
            lambda: ExpertLibrary.open(*asked.experts),
            device=asked.device,
            dtype=held,
            same_base=asked.same_base,
        )
        store = None
        if asked.profiles is not None:
            store = stack.enter_context(
                ProfileStore.open(asked.profiles, check=lambda each: _check(model, each), patience=_PATIENCE_SECONDS)
            )
        settings = _settings(asked, keys, model)
        serve(
            model,
            settings,
            listening,
            files=files,
            store=store,
            catalogue=catalogue,
            on_started=lambda: _tell(asked, settings, model, listening.getsockname()[1]),
            on_ending=lambda number: _tell_end(settings, number),
        )
    render.say("ended")


def _settings(asked: ServeOptions, keys: Sequence[str], model: SoupModel) -> Settings:
    from personalized_soups.serving.engine.limits import Limits
    from personalized_soups.serving.web.server import cache_bytes, context_of
    from personalized_soups.serving.web.settings import Rules, Settings

    memory = cache_bytes(model.model.device) if asked.cache_memory is None else round(asked.cache_memory * 2**30)
    return Settings(
        base=asked.name or _name_of(asked.base),
        rules=Rules(
            keys=keys,
            hosts=[each.lower() for each in (asked.host, *asked.allow_host)],
            origins=asked.cors_origin,
            max_body=round(asked.max_body * 2**20),
            max_requests=asked.max_requests,
        ),
        limits=Limits(
            max_rows=asked.max_rows,
            max_waiting=asked.max_waiting,
            max_context=context_of(model, asked.max_context),
            read_tokens=asked.read_tokens,
            cache_bytes=memory,
        ),
        default_max_tokens=asked.default_max_tokens,
        request_seconds=asked.request_timeout,
        grace_seconds=asked.grace,
        users_in_metrics=asked.users_in_metrics,
        started_with=["--base", asked.base, *(word for folder in asked.experts for word in ("--experts", str(folder)))],
    )


def _check(model: SoupModel, profile: Profile) -> None:
    model.resolve(profile)


def _name_of(base: str) -> str:
    """Return the name under which a base is served: its folder's, or the hub id."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def _tell_end(settings: Settings, num_answers: int) -> None:
    if num_answers:
        render.say(
            f"finishing {num_answers} answer{'s' if num_answers > 1 else ''}, "
            f"for {settings.grace_seconds:g} s at most; Ctrl-C again cuts off"
        )


def _tell(asked: ServeOptions, settings: Settings, model: SoupModel, port: int) -> None:
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    address = f"http://{host}:{port}"
    render.say(f"serving {settings.base} with {len(model.experts)} experts: {', '.join(model.experts)}")
    render.say(f"  playground   {address}/playground/")
    render.say(f"  OpenAI's API {address}/v1")
    if asked.profiles is None:
        there = "; profiles.db is there, and not used" if Path("profiles.db").exists() else ""
        render.say(f"  no profiles are kept; --profiles profiles.db keeps them{there}")
    render.say("Ctrl-C ends it, once running answers are done")
    if asked.opens_browser:
        import webbrowser

        webbrowser.open(f"{address}/playground/")
