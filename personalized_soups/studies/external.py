"""Prompts of files that are not the study's own: read them, draw some, and repeat the comparison on these.

Nothing is chosen on these prompts.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from personalized_soups.declare.evaluation import ExternalRecipe
from personalized_soups.errors import InputError, OutputExistsError, UsageError
from personalized_soups.generation.prompts import prompt_lines
from personalized_soups.studies.folder import write_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MEND = 'write {"prompt": "..."} on every line, or {"instruction": "...", "instances": [{"input": "..."}]}'


@dataclass(frozen=True, slots=True)
class ExternalPrompts:
    """The prompts that a study draws from one file.

    Attributes:
        file: the name of the file.
        prompts: the drawn prompts, in the order of the file.
        num_in_file: the number of prompts in the file.
        num_skipped: the number of prompts in the file that are longer than the recipe allows.
    """

    file: str
    prompts: tuple[str, ...]
    num_in_file: int
    num_skipped: int


def external_files(given: Sequence[str]) -> dict[str, Path]:
    """Return the file of each name, given as `NAME=FILE`.

    Raises:
        UsageError: if a text is not of this form, a name has other characters than letters, digits, `.`, `_` and `-`,
            or a name is repeated.
    """
    files: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or not file or not _NAME.fullmatch(name):
            raise UsageError(
                f"{text!r} is not of the form NAME=FILE",
                where="external",
                mend="give a short name and a file, such as koala=koala.jsonl",
            )
        if name in files:
            raise UsageError(
                f"the name {name!r} is given twice", where="external", mend="give each file a name of its own"
            )
        files[name] = Path(file)
    return files


def read_external(path: Path) -> list[str]:
    """Return the prompts of a JSON Lines file. Blank lines are skipped.

    A line has a `prompt`, or, as in self-instruct's human evaluation, an `instruction` with `instances`: the input of
    the first instance follows the instruction after an empty line.

    Raises:
        InputError: if the file cannot be read, has no prompts, or has a line of another form.
    """
    prompts = [_prompt_of(line, f"{path}:{number}") for number, line in prompt_lines(path)]
    if not prompts:
        raise InputError("the file holds no prompts", where=str(path), mend=_MEND)
    return prompts


def draw_external(
    path: Path, recipe: ExternalRecipe, *, num_tokens: Callable[[str], int], seed: int, stored: Path
) -> ExternalPrompts:
    """Draw prompts from a file, and store them. A later call returns the same prompts.

    Args:
        path: the file of prompts.
        recipe: the number of prompts and their maximum length. A file with fewer prompts gives all of them.
        num_tokens: a function that returns the number of tokens of a prompt.
        seed: the seed of the draw.
        stored: the file that stores the drawn prompts.

    Raises:
        InputError: if `read_external` raises it, or all prompts are too long.
        OutputExistsError: if `stored` has other prompts, because the file or the recipe has changed.
    """
    prompts = read_external(path)
    short = [at for at, prompt in enumerate(prompts) if num_tokens(prompt) <= recipe.max_prompt_tokens]
    if not short:
        raise InputError(
            f"all {len(prompts)} prompts have more than {recipe.max_prompt_tokens} tokens",
            where=str(path),
            mend="give a file with shorter prompts, or raise `external: max_prompt_tokens` in the recipe",
        )
    chosen = sorted(random.Random(f"external/{seed}").sample(short, min(recipe.num_prompts, len(short))))
    drawn = ExternalPrompts(
        path.name, tuple(prompts[at] for at in chosen), len(prompts), num_skipped=len(prompts) - len(short)
    )
    text = json.dumps(asdict(drawn), indent=2, ensure_ascii=False) + "\n"
    if stored.is_file() and stored.read_text(encoding="utf-8") != text:
        raise OutputExistsError(
            f"the study has already drawn other prompts as {stored.stem!r}",
            where=str(stored),
            mend="give the file under another name",
        )
    write_text(stored, text)
    return drawn


def _prompt_of(line: bytes, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        prompt = row["prompt"] if "prompt" in row else _instruction_of(row)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("the line is not a JSON object with a prompt", where=where, mend=_MEND)
    return prompt.strip()


def _instruction_of(row: dict[str, list[dict[str, str]] | str]) -> str:
    instruction, instances = row["instruction"], row["instances"]
    if not isinstance(instruction, str) or isinstance(instances, str):
        raise TypeError("an instruction is a text, and its instances are a list")
    own = instances[0]["input"].strip()
    return f"{instruction.strip()}\n\n{own}" if own else instruction
