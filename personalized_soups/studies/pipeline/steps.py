"""`Step`: one unit of work of a run, and the order of many of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from personalized_soups.errors import DeclarationError, choose_from

Report: TypeAlias = Callable[[Any], None]
Work: TypeAlias = Callable[[Path, Mapping[str, Path], Report], None]
"""Writes the files of a step into a folder, given the folders of the steps that it needs, and reports progress.

If an earlier call was interrupted, the folder holds what that call had written.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work. It must be picklable, because it may run in another process.

    Attributes:
        name: the step's name, which is also the name of its folder.
        settings: all on which the step's files depend, apart from the steps that it needs, as JSON values.
        needs: the names of the steps whose files it reads.
        work: writes the step's files.
        where: the place that declares the step, for errors.
        extent: how much work it is, in words, such as `384 answers`. It may be empty.
        is_result: whether the step's files are wanted for themselves. Other steps exist only because a step needs them.
    """

    name: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...]
    work: Work
    where: str = ""
    extent: str = ""
    is_result: bool = False

    def key(self, inputs: Mapping[str, str]) -> str:
        """Return the hex digest of all on which the step's files depend.

        Args:
            inputs: the digest of the files of each step that this step needs.
        """
        content = [dict(self.settings), {name: inputs[name] for name in self.needs}]
        return str(blake3(json.dumps(content, sort_keys=True).encode()).hexdigest())


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Return the steps in an order in which each comes after all that it needs.

    Of a declared step that was made for several targets, those that nothing uses are left out.

    Raises:
        DeclarationError: if two steps have the same name, a step needs an unknown step, steps need each other in a
            circle, or nothing that is declared in the place of a step is needed or a result.
    """
    by_name: dict[str, Step] = {}
    for step in steps:
        if step.name in by_name:
            raise DeclarationError(
                f"the step {step.name!r} is declared twice", where=step.where, mend="give each step its own name"
            )
        by_name[step.name] = step
    _check_names(steps, by_name)
    ordered = _ordered(by_name)
    needed = {name for step in steps for name in step.needs}
    used = {step.where or step.name for step in steps if step.name in needed or step.is_result}
    for step in steps:
        if (step.where or step.name) not in used:
            raise DeclarationError(
                f"no step uses the step {step.name!r}", where=step.where, mend="remove it, or use it in another step"
            )
    return _without_unused(ordered)


def _without_unused(ordered: Sequence[Step]) -> list[Step]:
    """Return the results and all that they need, in the same order."""
    wanted: set[str] = set()
    for step in reversed(ordered):
        if step.is_result or step.name in wanted:
            wanted |= {step.name, *step.needs}
    return [step for step in ordered if step.name in wanted]


def _check_names(steps: Sequence[Step], by_name: Mapping[str, Step]) -> None:
    for step in steps:
        for name in step.needs:
            if name not in by_name:
                raise DeclarationError(
                    f"the step {step.name!r} needs {name!r}, which is not declared",
                    where=step.where,
                    mend=choose_from(name, by_name),
                )


def _ordered(by_name: Mapping[str, Step]) -> list[Step]:
    """Return the steps so that each comes after all that it needs, in the order of their declaration where possible."""
    ordered: list[Step] = []
    done: set[str] = set()
    waiting = dict(by_name)
    while waiting:
        ready = [step for step in waiting.values() if done.issuperset(step.needs)]
        if not ready:
            circle = _circle(waiting)
            raise DeclarationError(
                f"steps need each other in a circle: {' -> '.join(circle)}",
                where=waiting[circle[0]].where,
                mend="remove one of these needs",
            )
        for step in ready:
            ordered.append(step)
            done.add(step.name)
            del waiting[step.name]
    return ordered


def _circle(waiting: Mapping[str, Step]) -> list[str]:
    """Return the names along a circle, of which the first is also the last."""
    path = [next(iter(waiting))]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in waiting[path[-1]].needs if name in waiting))
    return path[path.index(path[-1]) :]
