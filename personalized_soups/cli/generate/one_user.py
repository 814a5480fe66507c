"""`psoups generate PROMPT`: answer one prompt with a base, an adapter, or a soup merged for this answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from personalized_soups.cli.bases import LoadOptions
    from personalized_soups.cli.sampling import SamplingOptions
    from personalized_soups.declare.profile import Profile


@dataclass(frozen=True, slots=True)
class OneUserRequest:
    """A request to answer one prompt with a base, an adapter or a soup (the weighted sum of experts).

    Attributes:
        prompt: the prompt. If it is None or `-`, standard input is read.
        adapter: folder of the adapter to load; None loads no adapter.
        experts: folders of the experts to merge for this answer, instead of an adapter.
        profile: profile file with the weights of the experts.
        weights: weights of the experts as text (`a=0.6,b=0.6`), instead of a profile.
        allow_opposed: allow `weights` on two sides of one dimension.
        user_model: folder of a user model; None if no soft tokens come before the prompt.
        user: the user of the user model; None is the generic user.
    """

    prompt: str | None
    adapter: Path | None
    experts: Sequence[Path] | None
    profile: Path | None
    weights: str | None
    allow_opposed: bool
    user_model: Path | None = None
    user: str | None = None

    @property
    def given(self) -> list[str]:
        """The names of the given options and arguments that apply to one user only."""
        values = {
            "PROMPT": self.prompt,
            "--adapter": self.adapter,
            "--profile": self.profile,
            "--weights": self.weights,
            "--user": self.user,
        }
        return [name for name, value in values.items() if value is not None]


def answer_one_user(
    request: OneUserRequest, loading: LoadOptions, sampling: SamplingOptions, *, greedy: bool, as_json: bool
) -> None:
    """Print the answer while it is generated. If `as_json` is true, print one JSON object at the end.

    Raises:
        SoupError: if options contradict each other, or the prompt, the base or the experts cannot be read.
    """
    _check_sources(request)
    prompt = _prompt(request.prompt)
    if request.user_model is not None:
        text = _answer_with_user_model(request, prompt, loading, sampling, greedy=greedy)
        if as_json:
            render.show_json({"prompt": prompt, "answer": text, "seed": sampling.seed, "user": request.user})
        else:
            render.show_text(text)
        return
    with _adapter_of(request, same_base=loading.same_base) as folder:
        from personalized_soups.generation.generator import Generator

        generator = Generator.open(
            loading.path,
            folder,
            on=loading.on,
            device=loading.device,
            dtype=loading.dtype,
            same_base=loading.same_base,
        )
    pieces = generator.stream(
        prompt,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        greedy=greedy,
    )
    if as_json:
        render.show_json({"prompt": prompt, "answer": "".join(pieces), "seed": sampling.seed})
        return
    for piece in pieces:
        render.show_text(piece, end="")
    render.show_text("")


def _answer_with_user_model(
    request: OneUserRequest, prompt: str, loading: LoadOptions, sampling: SamplingOptions, *, greedy: bool
) -> str:
    """Return the answer with the user's soft tokens, the adapter of the user model and, if given, a soup."""
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.mixing.personal_answers import answer
    from personalized_soups.systems.p_rlhf.user_model import UserModel

    assert request.user_model is not None
    users = UserModel.open(request.user_model)
    profile = _profile_of(request) if request.experts else None
    model = SoupModel.from_pretrained(
        loading.path,
        ExpertLibrary.open(*(request.experts or ())),
        on=loading.on,
        device=loading.device,
        dtype=loading.dtype,
        same_base=loading.same_base,
    )
    users.check_base(model)
    (text,) = answer(
        model,
        [prompt],
        users.personal_model(request.user, profile=profile),
        max_new_tokens=sampling.max_new_tokens,
        temperature=0.0 if greedy else sampling.temperature,
        seed=sampling.seed,
    )
    return text


def _check_sources(request: OneUserRequest) -> None:
    has_profile, has_weights = request.profile is not None, request.weights is not None
    if request.user is not None and request.user_model is None:
        raise UsageError(
            "--user is given without --user-model",
            where="--user",
            mend="add --user-model FOLDER, the folder that psoups train --method p-dpo has written",
        )
    if request.adapter is not None and request.user_model is not None:
        raise UsageError(
            "--adapter cannot be combined with --user-model, whose folder holds an adapter too",
            where="--adapter, --user-model",
            mend="remove --adapter, or remove --user-model",
        )
    if request.adapter is not None and (request.experts or has_profile or has_weights):
        raise UsageError(
            "--adapter cannot be combined with --experts, --profile or --weights",
            where="--adapter, --experts",
            mend="remove --adapter, or remove the other options",
        )
    if request.experts and has_profile == has_weights:
        number = "both are given" if has_profile else "neither is given"
        raise UsageError(
            f"--experts needs exactly one of --profile and --weights, but {number}",
            where="--profile, --weights",
            mend="give --profile me.yaml, or give --weights elementary=0.6,concise=0.6",
        )
    if not request.experts and (has_profile or has_weights):
        raise UsageError(
            "--profile or --weights is given, but no experts are given",
            where="--experts",
            mend="add the folder of the experts, e.g. --experts quickstart/experts",
        )


def _prompt(prompt: str | None) -> str:
    from personalized_soups.generation.prompts import check_text

    where = "PROMPT"
    if prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise UsageError(
                "no prompt is given",
                where="PROMPT",
                mend='write the prompt in quotes, e.g. psoups generate --base tiny "How do I clean a kettle?"',
            )
        where = "standard input"
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(
                f"the prompt is not UTF-8: it contains the byte {error.object[error.start]:#04x}",
                where=where,
                mend="convert the text to UTF-8, e.g. iconv -f latin1 -t utf-8 prompt.txt | psoups generate ...",
            ) from error
    check_text(prompt, where=where)
    return prompt.strip()


@contextmanager
def _adapter_of(request: OneUserRequest, *, same_base: bool) -> Iterator[Path | None]:
    """Yield the folder of the adapter to load, or None if the base answers without an adapter.

    If experts are given, they are merged into an adapter in a temporary folder.
    """
    if not request.experts:
        yield request.adapter
        return
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.planning.options import MergeOptions
    from personalized_soups.merging.writing.adapter import merge

    merged = merge(ExpertLibrary.open(*request.experts), _profile_of(request), MergeOptions(same_base=same_base))
    with TemporaryDirectory(prefix="psoups-") as scratch:
        yield merged.write(Path(scratch) / "soup")


def _profile_of(request: OneUserRequest) -> Profile:
    from personalized_soups.declare.profile import Profile, load_profile

    if request.profile is not None:
        return load_profile(request.profile)
    fields = {"allow_opposed": True} if request.allow_opposed else {}
    return Profile.from_option(request.weights or "", **fields)
