"""`psoups generate --profiles`: many users' prompts, answered in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.generation.loading import Dtype


@dataclass(frozen=True, slots=True)
class ManyOptions:
    """What is asked for: a profile for every user of a file, and the prompts that they ask."""

    base: str
    experts: Sequence[Path]
    profiles: Path
    prompts: Path
    out: Path | None
    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int
    device: str
    dtype: Dtype
    same_base: bool
    overwrite: bool


def generate_many(options: ManyOptions) -> None:
    """Write every answer as a JSON line, to the file or to standard output; what the file holds is passed over."""
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.profiles import read_profiles
    from personalized_soups.files.lines import growing_lines
    from personalized_soups.generation.prompts import read_asked_prompts
    from personalized_soups.mixing.many_users import Requests, answer_many
    from personalized_soups.mixing.model import SoupModel

    check_no_input(options.out, [options.profiles, options.prompts])
    library = ExpertLibrary.open(*options.experts)
    profiles = list(read_profiles(options.profiles))
    if not profiles:
        raise UsageError(
            "the file holds no profile",
            where=str(options.profiles),
            mend='write {"user": "u1", "weights": {...}} lines',
        )
    for profile in profiles:
        library.check(profile)
    prompts = read_asked_prompts(options.prompts)
    requests = Requests(prompts, profiles)
    with ExitStack() as stack:
        kept = None
        if options.out is not None:
            kept = stack.enter_context(
                growing_lines(options.out, _settings(options, library), overwrite=options.overwrite)
            )
        first = 0 if kept is None else kept.num_done
        model = SoupModel.from_pretrained(
            resolve_base(options.base),
            library,
            device=options.device,
            dtype=options.dtype,
            same_base=options.same_base,
        )
        model.generator.check(prompts)
        if first:
            render.say(f"{first} of {len(requests)} answers are there: going on")
        bar = stack.enter_context(render.progress("answering", len(requests), done=first))
        stack.enter_context(telling_what_is_kept(options.out))
        answered = answer_many(
            model,
            requests,
            first=first,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            batch_size=options.batch_size,
        )
        done = first
        for batch in answered:
            rows = [{"user": each.profile.user, "prompt": each.prompt, "answer": answer} for each, answer in batch]
            if kept is None:
                for row in rows:
                    render.show_line(row)
            else:
                kept.add(rows)
            done += len(rows)
            bar.update(done)


def check_no_input(out: Path | None, inputs: Sequence[Path]) -> None:
    """Raise if an output is one of the files that are read.

    Raises:
        UsageError: naming it.
    """
    for path in inputs:
        if out is not None and out.exists() and path.exists() and out.samefile(path):
            raise UsageError("the output is one of the inputs", where=f"--out {out}", mend="choose another name")


@contextmanager
def telling_what_is_kept(out: Path | None) -> Iterator[None]:
    """Say on Ctrl-C that the answers so far are kept."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            render.say(f"the answers so far are kept in {out}: run the same command again to go on")
        raise


def _settings(options: ManyOptions, library: Any) -> dict[str, Any]:
    """Return what the answers depend on."""
    from personalized_soups.adapters.fingerprint import base_fingerprint
    from personalized_soups.files.digest import digest_file

    return {
        "base": base_fingerprint(resolve_base(options.base)),
        "experts": {name: [digest_file(path) for path in each.adapter.files] for name, each in library.items()},
        "profiles": digest_file(options.profiles),
        "prompts": digest_file(options.prompts),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "dtype": options.dtype,
    }
