"""A server from its start to its end: the socket first, then the model, and at the end what runs is finished."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import math
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import uvicorn

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.loading import Dtype
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.limits import max_context_of
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.web.app import Server
from personalized_soups.serving.web.connections import PatientProtocol
from personalized_soups.serving.web.settings import Settings
from personalized_soups.users.profiles.store import ProfileStore

# A key of fewer characters can be guessed.
_MIN_KEY = 16

# The default of max_context for a base that could do more.
_USUAL_CONTEXT = 32_768

# Longer than the minute for which balancers keep theirs: the side that closes first should not be this one.
_KEEP_ALIVE_SECONDS = 75

# In which those whose answers were cut off are told so.
_LAST_SECONDS = 3

# Of the memory that is free once the model stands.
_CACHE_SHARE = 0.5


def config_of(server: Server) -> uvicorn.Config:
    """Return how uvicorn is to run a server."""
    return uvicorn.Config(
        server.app,
        lifespan="off",
        interface="asgi3",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        http=PatientProtocol,
        ws="none",
        timeout_graceful_shutdown=math.ceil(server.settings.grace_seconds) + _LAST_SECONDS,
    )


def _nothing(*_: object) -> None:
    """Do nothing."""


class UvicornServer(uvicorn.Server):
    """uvicorn with a server of ours in it. It ends quietly on a signal: for a server that is no fault.

    Args:
        server: what is served.
        on_started: called once requests are answered.
        on_ending: called with the number of answers that are still to be finished.
    """

    def __init__(
        self, server: Server, *, on_started: Callable[[], None] = _nothing, on_ending: Callable[[int], None] = _nothing
    ) -> None:
        super().__init__(config_of(server))
        self._served = server
        self._on_started = on_started
        self._on_ending = on_ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that requests are answered from now on."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs; what is not done when the time is over is told so, before uvicorn breaks it off."""
        self._served.refuse_bodies()
        load = self._served.batcher.load
        self._on_ending(load.running + load.waiting)
        ending = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _cut_off(self) -> None:
        await asyncio.sleep(self._served.settings.grace_seconds)
        await asyncio.to_thread(self._served.close)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heed SIGINT and SIGTERM, and raise none of them again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def listen(host: str, port: int, *, has_key: bool, or_any: bool = False) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one, and so does `or_any` where the port is taken.

    Raises:
        UsageError: if other machines could reach it and no key is asked for, or the address can't be had.
    """
    if not has_key and not _is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and no key would be asked for",
            where="host",
            mend="give a file of API keys, or listen on host=127.0.0.1",
        )
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if or_any and error.errno == errno.EADDRINUSE:
            return listen(host, 0, has_key=has_key)
        raise UsageError(
            f"can't listen on {host}:{port}: {error.strerror or error}",
            where="host, port",
            mend="give another port; port=0 takes a free one",
        ) from error
    return listening


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file: one a line; empty lines and those that begin with # are passed over.

    Raises:
        InputError: if it can't be read, others may read it, or it holds none, or one that can be guessed.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the keys can't be read: {error}", where=str(path), mend="give a file of ASCII") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise InputError("other users of this machine can read the keys", where=str(path), mend=f"chmod 600 {path}")
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    mend = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
    if not keys:
        raise InputError("the file holds no key", where=str(path), mend=f"make one: {mend}")
    if any(" " in key or "\t" in key for key in keys):
        raise InputError("a key holds white space", where=str(path), mend=f"make one without: {mend}")
    short = next((number for number, key in enumerate(keys, 1) if len(key) < _MIN_KEY), None)
    if short is not None:
        raise InputError(
            f"key number {short} has fewer than {_MIN_KEY} characters", where=str(path), mend=f"make a long one: {mend}"
        )
    return keys


def load_model(
    base: str, experts: Callable[[], ExpertLibrary], *, device: str, dtype: Dtype, same_base: bool
) -> tuple[SoupModel, ExpertFiles]:
    """Load base and experts; what changes in the experts' folders from now on is noticed.

    Raises:
        SoupError: as SoupModel.from_pretrained.
    """
    files = ExpertFiles(experts)
    library, stamps = files.look()
    model = SoupModel.from_pretrained(base, library, device=device, dtype=dtype, same_base=same_base)
    files.serve(stamps)
    return model, files


def context_of(model: SoupModel, asked: int | None) -> int:
    """Return how many tokens prompt and answer may have together: what is asked for, or what the base can.

    Where nothing is asked for and the base knows no limit, or a large one, it is 32,768: room is kept for the longest.

    Raises:
        UsageError: if the base can do less than is asked for.
    """
    most = max_context_of(model.model.config)
    if asked is not None and asked > most:
        raise UsageError(
            f"a context of {asked} tokens is asked for, the base has {most}",
            where="max_context",
            mend=f"give {most} or fewer",
        )
    return asked or min(most, _USUAL_CONTEXT)


def cache_bytes(device: torch.device) -> int:
    """Return how many bytes keys and values may take: half of what is free on the model's device."""
    if device.type == "cuda":
        return int(_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
        free = next(int(line.split()[1]) << 10 for line in told.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 4 << 30
    return int(_CACHE_SHARE * free)


def serve(
    model: SoupModel,
    settings: Settings,
    listening: socket.socket,
    *,
    files: ExpertFiles,
    store: ProfileStore | None = None,
    catalogue: Catalogue | None = None,
    on_started: Callable[[], None] = _nothing,
    on_ending: Callable[[int], None] = _nothing,
) -> None:
    """Answer requests until SIGINT or SIGTERM; then take no new ones and finish those that run. Ctrl-C twice cuts off.

    Args:
        model, settings, files, store, catalogue: as of `app.Server`.
        listening: the socket.
        on_started: called once requests are answered.
        on_ending: called with the number of answers that are still to be finished.
    """

    async def run() -> None:
        server = Server(model, settings, files=files, store=store, catalogue=catalogue)
        try:
            await UvicornServer(server, on_started=on_started, on_ending=on_ending).serve(sockets=[listening])
        finally:
            server.close()

    # what stands now stays until the end: collecting garbage need not look through a million objects of libraries
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())
    finally:
        gc.unfreeze()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes a fast event loop; None where there is the usual one only."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
