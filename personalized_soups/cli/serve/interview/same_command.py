"""Write a command again as its user typed it, with some options changed, for messages that name the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def same_command(context: Any, changes: Mapping[str, object] | None = None) -> str:
    """Return the running command with its arguments, as a line that can be pasted into a shell.

    Args:
        context: the click context of the running command.
        changes: new values of parameters, by their Python names. True adds a flag, and None or False removes an option.
    """
    changed = dict(changes or {})
    words = context.command_path.split()
    for param in context.command.params:
        source = context.get_parameter_source(param.name)
        value = context.params.get(param.name) if source is not None and source.name == "COMMANDLINE" else None
        value = changed.get(param.name, value)
        if param.param_type_name == "argument":
            words.append(str(context.params[param.name]))
        elif value is True:
            words.append(param.opts[0])
        elif value is not None and value is not False:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [param.opts[0], str(each)]
    return shlex.join(words)
