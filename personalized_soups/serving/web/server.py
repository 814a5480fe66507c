"""Runs a server: opens the socket, loads the model, serves, and finishes running answers on SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import uvicorn

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import UsageError
from personalized_soups.generation.loading import Dtype
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.limits import max_context_of
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.web.app import Server
from personalized_soups.serving.web.connections import PatientProtocol
from personalized_soups.serving.web.settings import Settings
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.profiles.store import ProfileStore

# The default context for a base whose own context is larger or unknown.
_USUAL_CONTEXT = 32_768

# Load balancers close idle connections after a minute. This time is longer, so that the balancer closes them first.
_KEEP_ALIVE_SECONDS = 75

# Time to send errors to the clients whose answers were ended at the deadline.
_LAST_SECONDS = 3

# The KV cache's share of the memory that is free after the model is loaded.
_CACHE_SHARE = 0.5


def config_of(server: Server) -> uvicorn.Config:
    """Return uvicorn's configuration for a server."""
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
    """A uvicorn server that runs a `Server`. SIGINT and SIGTERM end it without an exception.

    Args:
        server: the server to run.
        on_started: called when the server accepts requests.
        on_ending: called with the number of unfinished answers when the server starts to shut down.
    """

    def __init__(
        self, server: Server, *, on_started: Callable[[], None] = _nothing, on_ending: Callable[[int], None] = _nothing
    ) -> None:
        super().__init__(config_of(server))
        self._served = server
        self._on_started = on_started
        self._on_ending = on_ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the server, and call `on_started` when it accepts requests."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the running requests.

        Requests that are not finished after `grace_seconds` get an error before uvicorn closes their connections.
        """
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
        """Handle SIGINT and SIGTERM. uvicorn would raise the signals again afterward, but this server does not."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def listen(host: str, port: int, *, has_key: bool, or_any: bool = False) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes a free port.
        has_key: whether the server checks API keys.
        or_any: whether to take a free port if `port` is in use.

    Raises:
        UsageError: if other machines could reach a server that checks no API keys, or the address cannot be used.
    """
    if not has_key and not _is_loopback(host):
        raise UsageError(
            f"other machines can reach {host}, but the server would accept requests without a key",
            where="host",
            mend="give a file of API keys (api_key_file=keys.txt), or listen on this machine only (host=127.0.0.1)",
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
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            where="host, port",
            mend="give another address or port; port=0 takes a free port",
        ) from error
    return listening


def load_model(
    base: str,
    experts: Callable[[], ExpertLibrary],
    *,
    on: Path | None = None,
    device: str,
    dtype: Dtype,
    same_base: bool,
) -> tuple[SoupModel, ExpertFiles]:
    """Load the base and its experts, and record the state of the experts' files.

    Args:
        base: the base's folder or model id.
        experts: opens the library of experts. It is called again at each reload.
        on, device, dtype, same_base: as for SoupModel.from_pretrained.

    Raises:
        SoupError: if the library cannot be opened, or the model cannot be loaded.
    """
    files = ExpertFiles(experts)
    library, stamps = files.look()
    model = SoupModel.from_pretrained(base, library, on=on, device=device, dtype=dtype, same_base=same_base)
    files.serve(stamps)
    return model, files


def context_of(model: SoupModel, wanted: int | None) -> int:
    """Return the maximum number of tokens of a prompt and its answer together.

    Args:
        model: the base with its experts.
        wanted: the maximum that the user asked for. None takes the base's own limit, or 32,768 if that limit is larger
            or unknown, because the cache reserves memory for the longest request.

    Raises:
        UsageError: if `wanted` exceeds the base's own limit.
    """
    most = max_context_of(model.model.config)
    if wanted is not None and wanted > most:
        raise UsageError(
            f"a context of {wanted} tokens is larger than the base's limit of {most} tokens",
            where="max_context",
            mend=f"give {most} or less, for example max_context={most}",
        )
    return wanted or min(most, _USUAL_CONTEXT)


def cache_bytes(device: torch.device) -> int:
    """Return the maximum size of the KV cache in bytes, which is half of the free memory of the device."""
    if device.type == "cuda":
        return int(_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        memory = Path("/proc/meminfo").read_text(encoding="ascii")
        free = next(int(line.split()[1]) << 10 for line in memory.splitlines() if line.startswith("MemAvailable"))
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
    pool: QuestionPool | None = None,
    on_started: Callable[[], None] = _nothing,
    on_ending: Callable[[int], None] = _nothing,
) -> None:
    """Serve until SIGINT or SIGTERM arrives. Then reject new requests, and finish the running requests.

    A second signal ends the running requests at once.

    Args:
        model, settings, files, store, catalogue, pool: as for `app.Server`.
        listening: the socket, from `listen`.
        on_started: called when the server accepts requests.
        on_ending: called with the number of unfinished answers when the server starts to shut down.
    """

    async def run() -> None:
        server = Server(model, settings, files=files, store=store, catalogue=catalogue, pool=pool)
        try:
            await UvicornServer(server, on_started=on_started, on_ending=on_ending).serve(sockets=[listening])
        finally:
            server.close()

    # The loaded libraries have a million objects that live until the end. The garbage collector need not scan them.
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())
    finally:
        gc.unfreeze()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory of event loops, or None if uvloop is not installed."""
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
