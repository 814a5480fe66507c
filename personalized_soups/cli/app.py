"""The command `psoups`: register the groups of commands, and turn errors into messages and exit codes.

Every command module has a function `register(app)`. It imports heavy libraries (torch, transformers, peft, numpy,
pydantic) only inside its functions, so that `psoups --help` prints quickly.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from personalized_soups import __version__
from personalized_soups.cli import render
from personalized_soups.cli.arguments import SoupCommand
from personalized_soups.errors import RunError, SoupError

# The groups of `psoups --help` and their commands, in the order of the help. Each group is a folder of cli/.
COMMAND_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "study": ("quickstart", "run", "evaluate", "quality", "study", "tiny"),
        "data": ("pairs", "data", "judge", "scorer"),
        "train": ("train",),
        "merge": ("doctor", "merge", "merge_many", "verify", "inspect"),
        "generate": ("generate", "sweep"),
        "users": ("basis", "questions", "tune"),
        "serve": ("serve", "playground", "profile"),
    }
)
_GROUP_TITLES = {
    "study": "Run the whole pipeline",
    "data": "Make training data, and judge answers",
    "train": "Train experts",
    "merge": "Merge experts, and check merges",
    "generate": "Generate text",
    "users": "Learn who users are",
    "serve": "Serve users",
}

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class SoupGroup(TyperGroup):
    """The group of all commands.

    A `SoupError`, Ctrl-C or a full disk ends in a message and an exit code. Other exceptions keep their traceback.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands, under the titles of their groups. Commands without a group are left out."""
        for group, names in COMMAND_GROUPS.items():
            commands = {name: self.commands[name] for name in (module.replace("_", "-") for module in names)}
            limit = formatter.width - 6 - max(map(len, commands))
            rows = [(name, command.get_short_help_str(limit)) for name, command in commands.items()]
            with formatter.section(_GROUP_TITLES[group]):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command. Exit with 2 for wrong usage or input, 1 for a failed run, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except SoupError as error:
            render.show_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            render.say("interrupted")
            raise typer.Exit(_INTERRUPTED) from interrupt
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            full = disk_full(error)
            render.show_error(full)
            raise typer.Exit(full.exit_code) from error


def disk_full(error: OSError) -> RunError:
    """Return the error that reports a full disk or an exceeded quota."""
    return RunError(
        f"the disk is full: {error.strerror}",
        where=str(error.filename or "the output folder's file system"),
        mend="free some space, or give --out a path on another disk; no incomplete output was left behind",
    )


def build_app() -> typer.Typer:
    """Return the application with every command registered."""
    app = typer.Typer(
        name="psoups",
        cls=SoupGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # Plain help prints quickly and is the same with every version of rich. docs/reference/cli.md contains it.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    app.callback()(_root)
    for group, names in COMMAND_GROUPS.items():
        for name in names:
            import_module(f"personalized_soups.cli.{group}.{name}").register(app)
    import_module("personalized_soups.cli.reference").register(app)
    _name_options(app)
    return app


def _name_options(app: typer.Typer) -> None:
    """Make the errors of every command, including nested commands, name the options of the command."""
    for command in app.registered_commands:
        command.cls = SoupCommand
    for group in app.registered_groups:
        assert group.typer_instance is not None
        _name_options(group.typer_instance)


def main() -> None:
    """Run `psoups` with the arguments of the process."""
    build_app()(prog_name="psoups")


def _show_version(value: bool) -> None:
    if value:
        render.show_text(f"psoups {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train one LoRA expert per preference, then merge a personal model for any mixture of preferences."""
