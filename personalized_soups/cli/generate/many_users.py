"""`psoups generate --profiles`: answer the prompts of many users in mixed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render
from personalized_soups.cli.generate.outputs import check_no_input, reporting_kept_answers
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.cli.bases import LoadOptions
    from personalized_soups.cli.sampling import SamplingOptions
    from personalized_soups.declare.profile import Profile
    from personalized_soups.mixing.many_users import Request
    from personalized_soups.systems.p_rlhf.user_model import UserModel


@dataclass(frozen=True, slots=True)
class ManyUsersRequest:
    """A request to answer prompts for many users, each with the user's own soup (the weighted sum of experts).

    Attributes:
        experts: folders of the experts. They may be empty if there is a user model.
        profiles: JSON Lines file of profiles. It may be None if there is a user model.
        prompts: file of prompts. A prompt is answered for the user that its line names. If the line names no user, the
            prompt is answered for every user.
        out: JSON Lines file for the answers. If None, the answers are printed.
        overwrite: discard an existing `out` and start again.
        user_model: folder of a user model, whose soft tokens come before the prompts of its users.
    """

    experts: Sequence[Path]
    profiles: Path | None
    prompts: Path
    out: Path | None
    overwrite: bool
    user_model: Path | None = None


def checked_many_users(
    experts: Sequence[Path] | None,
    profiles: Path | None,
    prompts: Path | None,
    out: Path | None,
    user_model: Path | None,
    *,
    overwrite: bool,
) -> ManyUsersRequest:
    """Check the options for many users and return them as a request.

    Raises:
        UsageError: if the profiles, the prompts or the experts are missing.
    """
    if user_model is not None and prompts is not None and profiles is None and not experts:
        return ManyUsersRequest((), None, prompts, out, overwrite, user_model)
    if profiles is None or prompts is None or not experts:
        values = {"--profiles FILE": profiles, "--prompts FILE": prompts, "--experts FOLDER": experts}
        missing = [option for option, value in values.items() if not value]
        raise UsageError(
            "answers for many users need --profiles, --prompts and --experts, but some of these options are missing",
            where=", ".join(option.split()[0] for option in missing),
            mend=f"add {' '.join(missing)}",
        )
    return ManyUsersRequest(experts, profiles, prompts, out, overwrite, user_model)


def answer_many_users(request: ManyUsersRequest, loading: LoadOptions, sampling: SamplingOptions) -> None:
    """Write the answers as JSON Lines to `request.out`, or print them if it is None.

    Answers that the file already contains are not generated again.

    Raises:
        SoupError: if a file cannot be read, a profile does not fit the experts, or the output holds a run with
            different inputs.
    """
    from personalized_soups.adapters.library import Expert, ExpertLibrary
    from personalized_soups.files.lines import growing_lines
    from personalized_soups.generation.prompts import read_asked_prompts
    from personalized_soups.mixing.many_users import Requests, answer_many
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.mixing.personal_model import PersonalModel
    from personalized_soups.systems.p_rlhf.user_model import UserModel

    def personal(query: Request) -> PersonalModel:
        if users is None:
            return PersonalModel(profile=query.profile)
        return users.personal_model(query.user, profile=query.profile)

    check_no_input(request.out, [path for path in (request.profiles, request.prompts) if path is not None])
    library = ExpertLibrary.open(*request.experts)
    profiles = None if request.profiles is None else _profiles(request.profiles, library)
    users = None if request.user_model is None else UserModel.open(request.user_model)
    prompts = read_asked_prompts(request.prompts)
    requests = Requests(prompts, profiles)
    with ExitStack() as stack:
        lines = None
        if request.out is not None:
            settings = _settings(request, library, users, loading, sampling)
            lines = stack.enter_context(growing_lines(request.out, settings, overwrite=request.overwrite))
        first = 0 if lines is None else lines.num_done
        model = SoupModel.from_pretrained(
            loading.path,
            library,
            on=loading.on,
            device=loading.device,
            dtype=loading.dtype,
            same_base=loading.same_base,
        )
        model.generator.check(prompts)
        if users is not None:
            users.check_base(model)
            # `answer` finds the adapter among the experts, and so does not add it for each batch.
            model.experts.add(Expert(_free_name(users.folder.resolve().name, library), users.folder))
        if first:
            render.say(f"resuming: {first} of {len(requests)} answers are written already")
        bar = stack.enter_context(render.progress("answering", len(requests), done=first))
        stack.enter_context(reporting_kept_answers(request.out))
        batches = answer_many(
            model,
            requests,
            personal=personal,
            first=first,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
        )
        num_done = first
        for batch in batches:
            rows = [{"user": query.user, "prompt": query.prompt, "answer": answer} for query, answer in batch]
            if lines is None:
                for row in rows:
                    render.show_line(row)
            else:
                lines.add(rows)
            num_done += len(rows)
            bar.update(num_done)


def _profiles(path: Path, library: ExpertLibrary) -> list[Profile]:
    from personalized_soups.declare.profiles import read_profiles

    profiles = list(read_profiles(path))
    if not profiles:
        raise UsageError(
            "the file holds no profile",
            where=str(path),
            mend='write one profile per line, e.g. {"user": "u1042", "weights": {"expert": 0.6}}',
        )
    for profile in profiles:
        library.check(profile)
    return profiles


def _free_name(name: str, library: ExpertLibrary) -> str:
    """Return the name, with as many underscores at its end as it takes to differ from the names of the experts."""
    while name in library:
        name += "_"
    return name


def _settings(
    request: ManyUsersRequest,
    library: ExpertLibrary,
    users: UserModel | None,
    loading: LoadOptions,
    sampling: SamplingOptions,
) -> Mapping[str, Any]:
    """Return all inputs that affect the answers. A run can be resumed only with the same inputs."""
    from personalized_soups.files.digest import digest_file

    of_users = {} if users is None else {"user_model": [digest_file(path) for path in users.files]}
    return {
        "base": loading.fingerprint,
        "experts": {name: [digest_file(path) for path in expert.adapter.files] for name, expert in library.items()},
        "profiles": None if request.profiles is None else digest_file(request.profiles),
        "prompts": digest_file(request.prompts),
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "dtype": loading.dtype,
        **of_users,
    }
