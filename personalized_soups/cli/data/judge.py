"""`psoups judge`: measure how far a judge of answers can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import DeviceOption, JsonOption, SeedOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from personalized_soups.evaluation.judge_report import Agreement, HumanComparison, JudgeReport, Share
    from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement, PairJudge


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Measure how far a judge of answers can be trusted.")
    group.command("agreement")(agreement)
    app.add_typer(group, name="judge")


JudgeOption = Annotated[
    Path, typer.Option(help="File that declares the judge, e.g. recipes/judges/openai.yaml.", show_default=False)
]
ReplyCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="File of the replies of an LLM judge, so that nothing is asked twice. By default, a file in the user's "
        "cache folder.",
        show_default=False,
    ),
]


def reply_cache(cache: Path | None) -> Path:
    """Return the file of an LLM judge's replies: the given one, or one in the user's cache folder."""
    from personalized_soups.files.cache_folder import reply_cache_file

    return cache or reply_cache_file()


def agreement(
    comparisons: Annotated[
        Path,
        typer.Argument(
            help="Comparisons that people made: JSON Lines with the keys prompt, first, second and preferred, or the "
            "feedback data of Fine-Grained RLHF."
        ),
    ],
    *,
    judge: JudgeOption,
    criterion: Annotated[
        str, typer.Option(help="What the better answer does better, where a comparison names no criterion.")
    ] = "The better answer helps more: it is correct, complete and to the point.",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Judge only this many comparisons, drawn at random.", show_default=False)
    ] = None,
    cache: ReplyCacheOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare a judge's verdicts with those of people, and report its biases.

    An LLM judge is asked about each comparison in both orders. Two different verdicts are a tie.
    """
    from personalized_soups.evaluation.human_comparisons import read_human_comparisons

    people = _drawn(read_human_comparisons(comparisons, criterion=criterion), limit, seed)

    from personalized_soups.evaluation.judge_report import agreement as agreement_of
    from personalized_soups.evaluation.judge_report import judge_report
    from personalized_soups.scoring.judging.open_judge import open_judge

    with open_judge(judge, cache=reply_cache(cache), device=device) as opened:
        with render.progress("judging", len(people), quiet=as_json) as bar:
            judgements = opened.compare([human.answers for human in people], on_done=bar.update)
        report = judge_report([human.answers for human in people], judgements)
        _show(opened, report, agreement_of(people, judgements), as_json=as_json)


def _drawn(people: Sequence[HumanComparison], limit: int | None, seed: int) -> Sequence[HumanComparison]:
    import random

    return people if limit is None or limit >= len(people) else random.Random(seed).sample(list(people), limit)


def _show(judge: PairJudge, report: JudgeReport, agreed: Agreement, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        render.show_json(
            {
                "judge": judge.settings,
                "traffic": shown_traffic(judge),
                "biases": asdict(report),
                "agreement": asdict(agreed),
            }
        )
        return
    record: dict[str, Any] = {
        "comparisons": sum(report.counts.values()),
        "verdicts": ", ".join(f"{verdict} {count}" for verdict, count in report.counts.items()),
        "agreement": f"{_shown(agreed.credit)}; a tie or no verdict counts as half",
        "where both decide": _shown(agreed.accuracy),
        "longer answer": f"{_shown(agreed.longer)}: the agreement of always naming the longer answer",
        "kappa": "-" if agreed.kappa is None else f"{agreed.kappa:.2f}",
    }
    render.show_record(record | _biases(report) | shown_traffic(judge), as_json=False)


def shown_biases(compared: Sequence[tuple[ComparedAnswers, Judgement]]) -> dict[str, Any]:
    """Return how position and length decide a judge's verdicts, as rows of a record."""
    from personalized_soups.evaluation.judge_report import judge_report

    return _biases(judge_report([answers for answers, _ in compared], [judgement for _, judgement in compared]))


def _biases(report: JudgeReport) -> dict[str, Any]:
    return {
        "first shown": f"{_shown(report.first_shown)} of the verdicts; 0.5 is no bias",
        "orders disagree": _shown(report.flipped),
        "longer wins": f"{_shown(report.longer)} of the decided comparisons",
    }


def shown_traffic(judge: PairJudge) -> dict[str, Any]:
    """Return what an LLM judge sent and what it costs. Other judges send nothing."""
    from personalized_soups.scoring.judging.llm_judge import LlmJudge

    if not isinstance(judge, LlmJudge):
        return {}
    traffic, cost = judge.traffic, judge.cost
    return {
        "model": ", ".join(sorted(traffic.models)),
        "replies": f"{traffic.num_asked} asked, {traffic.num_cached} from the cache, {judge.num_cut} cut",
        "retries": traffic.num_retries,
        "tokens": f"{traffic.input_tokens} in, {traffic.output_tokens} out",
        "cost": "-" if cost is None else f"{cost:.4f} USD",
    }


def _shown(share: Share | None) -> str:
    return "-" if share is None else f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}] of {share.num}"
