from __future__ import annotations

import ast
import errno
import inspect
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from personalized_soups.cli import app as app_module
from personalized_soups.cli.app import COMMAND_GROUPS, SoupGroup, build_app
from personalized_soups.errors import InputError, RunError, SoupError

HEAVY = ("torch", "transformers", "peft", "trl", "numpy", "pydantic", "ruamel", "rich", "safetensors")

LOADED = """
import sys
{statement}
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""

COMMANDS = [name for names in COMMAND_GROUPS.values() for name in names]


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `statement`."""
    code = LOADED.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=250)
    return set(done.stdout.splitlines()[-1].split())


def run(command: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run one command in the real group and return its exit code, stdout and stderr."""
    app = typer.Typer(cls=SoupGroup, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(lambda: None)
    app.command("work")(command)
    with pytest.raises(SystemExit) as caught:
        app(["work"], prog_name="psoups")
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def psoups(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "personalized_soups", *args], capture_output=True, text=True, check=False, timeout=250
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import personalized_soups").isdisjoint(HEAVY)


def test_help_loads_nothing_heavy() -> None:
    statement = """
from personalized_soups.cli.app import main
sys.argv = ["psoups", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code
"""
    assert loaded_by(statement).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_loads_nothing_heavy(name: str) -> None:
    statement = f"""
from personalized_soups.cli.app import build_app
try:
    build_app()(["{name.replace("_", "-")}", "--help"])
except SystemExit as done:
    assert not done.code, done.code
"""
    # typer itself checks some kinds of default through pydantic
    assert loaded_by(statement).isdisjoint({*HEAVY} - {"pydantic"})


def test_every_row_of_the_table_is_a_module_with_commands() -> None:
    import typer.main

    command = typer.main.get_command(build_app())
    assert set(getattr(command, "commands", {})) == {"reference", *(name.replace("_", "-") for name in COMMANDS)}


def test_the_body_of_every_command_is_short() -> None:
    """A command parses, calls and prints. Docstring and signature do not count."""
    import typer.main

    def bodies(command: Any) -> Iterator[tuple[str, int]]:
        for child in getattr(command, "commands", {}).values():
            yield from bodies(child)
        if command.callback is not None:
            function = inspect.unwrap(command.callback)
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            assert isinstance(tree, ast.FunctionDef)
            body = tree.body[ast.get_docstring(tree) is not None :]
            yield function.__name__, (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0

    lengths = dict(bodies(typer.main.get_command(build_app())))
    assert {"merge", "export_profiles", "build"} < set(lengths)
    assert {name: length for name, length in lengths.items() if length > 25} == {}


def test_help_lists_every_command_once_under_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_app()(["--help"])
    listed = [
        line.split()[0]
        for line in capsys.readouterr().out.partition("Run the whole")[2].splitlines()
        if line.startswith("  ")
    ]
    assert listed == [name.replace("_", "-") for name in COMMANDS]


@pytest.mark.parametrize(("kind", "code"), [(InputError, 2), (RunError, 1)])
def test_errors_are_three_lines_on_stderr(kind: type[SoupError], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise kind("it is broken [b]", where="a/file:3", mend="mend it")

    assert run(work, capsys) == (code, "", "error: it is broken [b]\n   at: a/file:3\n mend: mend it\n")


def test_a_full_disk_is_a_failed_run(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors")

    code, out, err = run(work, capsys)
    assert (code, out) == (1, "")
    assert "error: the disk is full" in err
    assert "at: out/model.safetensors" in err
    assert "mend: free some space" in err


def test_other_os_errors_keep_their_traceback() -> None:
    app = typer.Typer(cls=SoupGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)

    @app.command("work")
    def work() -> None:
        raise PermissionError(errno.EACCES, "denied", "x")

    with pytest.raises(PermissionError):
        app(["work"])


def test_ctrl_c_prints_one_word_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    assert run(work, capsys) == (130, "", "interrupted\n")


def test_a_process_that_gets_sigint_exits_with_130() -> None:
    code = """
import time, typer
from personalized_soups.cli.app import SoupGroup
app = typer.Typer(cls=SoupGroup, pretty_exceptions_enable=False)
app.callback()(lambda: None)
@app.command("work")
def work() -> None:
    print("ready", flush=True)
    time.sleep(300)
app(["work"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that runs in the background has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_unknown_commands_and_options_are_usage_errors() -> None:
    for args in (["mrege"], ["--mrege"]):
        done = psoups(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert args[0] in done.stderr
        assert "Traceback" not in done.stderr


def test_version_prints_the_packages_version() -> None:
    from personalized_soups import __version__

    assert psoups("--version").stdout == f"psoups {__version__}\n"


def test_errors_can_be_pickled() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(app_module.disk_full(OSError(errno.ENOSPC, "full", "f"))))
    assert (type(error), error.where, error.exit_code) == (RunError, "f", 1)
