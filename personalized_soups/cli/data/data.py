"""`psoups data`: the three steps from prompts to preference pairs, one at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions, catalogue_of, checked_dtype
from personalized_soups.cli.data.judge import ReplyCacheOption, reply_cache, shown_biases, shown_traffic
from personalized_soups.cli.data.outputs import check_new_file
from personalized_soups.cli.data.pair_limits import MaxPairsOption, MinGapOption, check_min_gap
from personalized_soups.cli.data.pair_table import show_pairs
from personalized_soups.cli.data.pool import PoolRequest, check_instructed
from personalized_soups.cli.options import (
    BaseOption,
    BatchSizeOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    OnOption,
    PromptsOption,
    SeedOption,
    TemperatureOption,
)
from personalized_soups.cli.sampling import SamplingOptions, check_temperature
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.scoring.judging.pair_judge import PairJudge
    from personalized_soups.training.labelling import Compared

OverwriteFileOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Make training data step by step: sample, label, and pair answers.")
    group.command("rollouts")(rollouts)
    group.command("label")(label)
    group.command("pairs")(pairs)
    app.add_typer(group, name="data")


def rollouts(
    *,
    base: BaseOption,
    on: OnOption = None,
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option(help="JSON Lines file of prompts with sampled answers to write.")],
    num_samples: Annotated[int, typer.Option(min=1, help="Number of answers to each prompt.")] = 2,
    instructed: Annotated[
        int, typer.Option(min=0, help="How many of the answers to a prompt are sampled under a side's instruction.")
    ] = 0,
    side: Annotated[
        str | None,
        typer.Option(
            help="Use only the instructions of this side's dimension, not those of all sides of the catalogue.",
            show_default=False,
        ),
    ] = None,
    dimensions: DimensionsOption = None,
    temperature: TemperatureOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 256,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sample answers to prompts from a base model. An interrupted run is resumed by the same command."""
    check_temperature(temperature, usual=1.0)
    check_instructed(instructed, num_samples)
    check_new_file(out, overwrite=overwrite)
    loading = LoadOptions(base, device, checked_dtype(dtype), on=on)
    catalogue = _catalogue(base, dimensions)

    from personalized_soups.training.instructions import InstructedShare, instructions_of
    from personalized_soups.training.rollouts import write_pool

    share = InstructedShare(instructed, instructions_of(catalogue, side))
    journal = out.with_name(f".{out.name}.sampling")
    sampling = SamplingOptions(max_new_tokens, temperature, seed, batch_size)
    sampled = PoolRequest(prompts, None, journal, num_samples, share, loading, sampling).answers(quiet=as_json)
    write_pool(out, sampled)
    journal.unlink(missing_ok=True)
    record = {"file": str(out), "prompts": len(sampled), "answers": sum(len(each.answers) for each in sampled)}
    render.show_record(record, as_json=as_json)


def label(
    rollouts: Annotated[Path, typer.Argument(help="File of sampled answers, from psoups data rollouts.")],
    *,
    side: Annotated[str, typer.Option(help="The side for which the answers are labelled, e.g. concise.")],
    out: Annotated[Path, typer.Option(help="JSON Lines file of labels to write.")],
    judge: Annotated[
        Path | None,
        typer.Option(
            help="File that declares a judge, e.g. recipes/judges/openai.yaml. Without it, the side's scorer rates "
            "the answers.",
            show_default=False,
        ),
    ] = None,
    comparisons: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Comparisons of a judge for each prompt. By default, each answer is compared once.",
            show_default=False,
        ),
    ] = None,
    dimensions: DimensionsOption = None,
    whole_sentences: Annotated[
        bool, typer.Option("--whole-sentences", help="Remove a cut-off last sentence from each answer first.")
    ] = False,
    cache: ReplyCacheOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Label sampled answers for one side, by its scorer or by a judge. An interrupted run is resumed.

    The file of labels has a judge's ties too. psoups data pairs writes them as pairs only with --ties.
    """
    catalogue = _catalogue("", dimensions)
    _check_comparisons(judge, comparisons)

    from contextlib import ExitStack

    from personalized_soups.scoring.judging.open_judge import open_judge
    from personalized_soups.training.labelling import LabelRequest

    with ExitStack() as stack:
        opened = None
        if judge is not None:
            opened = stack.enter_context(open_judge(judge, cache=reply_cache(cache), device=device))
        request = LabelRequest(rollouts, side, catalogue, opened, comparisons, whole_sentences, seed)
        with render.progress("labelling prompts", request.num_prompts(), quiet=as_json) as bar:
            compared = request.write(out, overwrite=overwrite, on_done=bar.update)
        _show_labels(out, compared, opened, as_json=as_json)


def pairs(
    labels: Annotated[Path, typer.Argument(help="File of labels, from psoups data label.")],
    *,
    out: Annotated[Path, typer.Option(help="JSON Lines file of pairs to write, in TRL's preference format.")],
    ties: Annotated[
        Path | None,
        typer.Option(help="Also write the ties of a judge, each in both directions, to this file.", show_default=False),
    ] = None,
    min_gap: MinGapOption = 0.3,
    max_pairs: MaxPairsOption = None,
    match_length: Annotated[
        bool, typer.Option("--match-length", help="Choose pairs whose two answers are equally long on average.")
    ] = False,
    messages: Annotated[
        bool, typer.Option("--messages", help="Write conversations, for a base with a chat template.")
    ] = False,
    seed: SeedOption = 0,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose preference pairs from labels. psoups train reads them."""
    check_min_gap(min_gap)
    for file in (out, ties):
        if file is not None:
            check_new_file(file, overwrite=overwrite)

    from personalized_soups.training.data import write_pairs
    from personalized_soups.training.labels import read_labels
    from personalized_soups.training.pairs import choose_pairs, tied_pairs

    lines = read_labels(labels)
    limits: dict[str, Any] = {"min_gap": min_gap, "max_pairs": max_pairs, "seed": seed, "match_length": match_length}
    chosen = choose_pairs(lines, conversational=messages, **limits)
    write_pairs(out, chosen)
    more: dict[str, Any] = {}
    if ties is not None:
        tied = tied_pairs(lines, conversational=messages)
        write_pairs(ties, tied)
        more = {"ties": len(tied) // 2}
    show_pairs(chosen, more, side=lines[0].side, out=out, num_prompts=len(lines), as_json=as_json)


def _catalogue(base: str, dimensions: Path | None) -> Catalogue:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load

    return load(catalogue_of(base, dimensions), Catalogue)


def _check_comparisons(judge: Path | None, comparisons: int | None) -> None:
    if judge is None and comparisons is not None:
        raise UsageError(
            "a scorer rates each answer, and compares none", where="--comparisons", mend="remove it, or give --judge"
        )


def _show_labels(out: Path, compared: Compared, judge: PairJudge | None, *, as_json: bool) -> None:
    from personalized_soups.training.labels import read_labels

    lines = read_labels(out)
    record: dict[str, Any] = {"side": lines[0].side, "file": str(out), "prompts": len(lines)}
    record |= {"answers": sum(len(line.answers) for line in lines)}
    if judge is None:
        record |= {"invalid": sum(score is None for line in lines for score in line.scores)}
    else:
        counts = Counter(compared.verdict for line in lines for compared in line.comparisons)
        record |= {verdict: counts[verdict] for verdict in ("first", "second", "tie", "unparsed")}
        record |= shown_biases(compared) | shown_traffic(judge)
    render.show_record(record, as_json=as_json)
