"""A PostgreSQL server of the tests' own: in a temporary folder, on a Unix socket, gone at the end."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("initdb", "pg_ctl")
NOT_INSTALLED = "PostgreSQL's initdb and pg_ctl are not installed"

# They refuse to run as root, who hands the folder to one of these.
_OTHER_USERS = ("postgres", "nobody")


def find_programs() -> dict[str, str] | None:
    """Return the paths of the server's programs; None where one is missing. Debian keeps them off the PATH."""
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    found = {name: shutil.which(name, path=os.pathsep.join(folders)) for name in PROGRAMS}
    return {name: path for name, path in found.items() if path} if all(found.values()) else None


class Server:
    """A server that can be stopped and started again."""

    def __init__(self, folder: Path, programs: dict[str, str], user: str | None) -> None:
        self._folder, self._programs, self._user = folder, programs, user
        self._run("initdb", "--auth=trust", "--username=tests", "--encoding=UTF8", "--locale=C", "--no-sync", "data")

    def url(self, database: str = "postgres", **options: str) -> str:
        query = "&".join(f"{key}={value}" for key, value in {"host": str(self._folder), **options}.items())
        return f"postgresql://tests@/{database}?{query}"

    def start(self) -> None:
        settings = ("listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off", "max_connections=60")
        options = " ".join(f"-c {setting}" for setting in settings)
        self._run("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-D", "data", "-m", "immediate")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs[program], *arguments],
            cwd=self._folder,
            user=self._user,
            # the server would inherit a pipe and never end it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{program} {arguments}: {self._log()}"

    def _log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self._folder.glob("log"))


@contextmanager
def running_server(programs: dict[str, str]) -> Iterator[Server]:
    """Yield a server that runs until the block ends."""
    # not below pytest's folder: a socket's path has no more than 107 bytes, and others may not enter there
    folder = Path(tempfile.mkdtemp(prefix="psoups-pg-"))
    try:
        user = None
        if os.geteuid() == 0:
            user = _another_user()
            shutil.chown(folder, user)
        server = Server(folder, programs, user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _another_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in _OTHER_USERS if name in names), getpass.getuser())
