"""`psoups merge`: merge the experts of a library for one user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.merge.request import (
    adapter_facts,
    check_one_base,
    checked_copy_mode,
    checked_experts,
    given_options,
    resolved,
)
from personalized_soups.cli.options import (
    AllowOpposedOption,
    DensityOption,
    EnergyOption,
    EpsilonOption,
    JsonOption,
    LambdaOption,
    MergeBaseOption,
    MergeDeviceOption,
    MergeDtypeOption,
    MergeExpertsOption,
    MergeOnOption,
    MethodOption,
    MethodSeedOption,
    OverwriteOption,
    RankOption,
    SameBaseOption,
    TargetOption,
    WeightsOption,
)
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.files.copies import CopyMode
    from personalized_soups.merging.planning.options import MergeOptions
    from personalized_soups.merging.planning.plan import MergePlan
    from personalized_soups.merging.writing.adapter import MergedAdapter
    from personalized_soups.merging.writing.into_base import MergedModel


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="merge")(merge)


def merge(
    profile: Annotated[Path | None, typer.Argument(help="Profile file (YAML or JSON).")] = None,
    *,
    experts: MergeExpertsOption = None,
    out: Annotated[Path | None, typer.Option(help="New folder to write.", show_default=False)] = None,
    weights: WeightsOption = None,
    method: MethodOption = None,
    density: DensityOption = None,
    epsilon: EpsilonOption = None,
    lambda_: LambdaOption = None,
    seed: MethodSeedOption = None,
    rank: RankOption = None,
    energy: EnergyOption = None,
    target: TargetOption = "peft",
    device: MergeDeviceOption = "auto",
    dtype: MergeDtypeOption = None,
    base: MergeBaseOption = None,
    on: MergeOnOption = None,
    into_base: Annotated[
        str | None, typer.Option(help="Add the soup to the weights of this base model, and write a full model.")
    ] = None,
    untouched: Annotated[
        str,
        typer.Option(help="How to copy weight files that the soup does not change: copy, reflink or link (hard link)."),
    ] = "copy",
    overwrite: OverwriteOption = False,
    durable: Annotated[
        bool, typer.Option("--durable", help="Wait until all bytes are on the disk before the output appears.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    same_base: SameBaseOption = False,
    allow_opposed: AllowOpposedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge experts for one user into a LoRA adapter, or with --into-base into a full model.

    The merged adapter or model is called a soup: the weighted sum of the experts.
    """
    folders = checked_experts(experts)
    _check_out(out, dry_run=dry_run)
    check_one_base(base, into_base)
    copy_mode = checked_copy_mode(untouched)
    from personalized_soups.merging.planning.options import MergeOptions

    options = MergeOptions(
        method=method,
        method_options=given_options(density=density, epsilon=epsilon, lambda_=lambda_, seed=seed),
        rank=rank,
        energy=energy,
        dtype=dtype,
        target=target,
        device=device,
        same_base=same_base,
        base=resolved(base),
        on=on,
    )
    merged = _planned(folders, _profile(profile, weights, allow_opposed=allow_opposed), options, resolved(into_base))
    if dry_run or out is None:
        merged.check(out, overwrite)
        _show_plan(merged.plan, as_json=as_json)
    else:
        _write(merged, out, overwrite, durable, copy_mode, quiet=as_json)
        _show_soup(out, as_json=as_json)


def _check_out(out: Path | None, *, dry_run: bool) -> None:
    if out is None and not dry_run:
        raise UsageError("no output folder is given", where="--out", mend="give --out my-soup, or give --dry-run")


def _profile(path: Path | None, weights: str | None, *, allow_opposed: bool) -> Profile:
    if (path is None) == (weights is None):
        number = "neither is given" if path is None else "both are given"
        raise UsageError(
            f"exactly one of a profile file and --weights must be given, but {number}",
            where="PROFILE, --weights",
            mend="run psoups merge me.yaml ..., or run psoups merge --weights elementary=0.6,concise=0.6 ...",
        )
    from personalized_soups.declare.profile import Profile, load_profile

    if path is not None:
        declared = load_profile(path)
        return declared.replaced(allow_opposed=True) if allow_opposed else declared
    assert weights is not None
    return Profile.from_option(weights, allow_opposed=allow_opposed)


def _planned(
    folders: list[Path], profile: Profile, options: MergeOptions, into_base: str | None
) -> MergedAdapter | MergedModel:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.writing.adapter import merge as merge_adapter
    from personalized_soups.merging.writing.into_base import MergedModel

    library = ExpertLibrary.open(*folders)
    if into_base is None:
        return merge_adapter(library, profile, options)
    return MergedModel.of(library, profile, into_base, options)


def _write(
    merged: MergedAdapter | MergedModel, out: Path, overwrite: bool, durable: bool, untouched: CopyMode, *, quiet: bool
) -> None:
    from personalized_soups.merging.writing.adapter import MergedAdapter

    if isinstance(merged, MergedAdapter):
        merged.write(out, overwrite, durable)
        return
    with render.progress("folding", quiet=quiet) as bar:
        merged.write(
            out,
            overwrite,
            durable,
            untouched=untouched,
            # the bar counts MiB
            progress=lambda done, total: bar.update(done >> 20, total=max(total >> 20, 1)),
        )


def _show_plan(plan: MergePlan, *, as_json: bool) -> None:
    if not as_json:
        render.show_text("\n".join(plan.lines()))
        return
    render.show_json(
        {
            "experts": {expert.name: expert.weight for expert in plan.experts},
            "method": plan.method.name,
            "options": dict(plan.options),
            "encoding": plan.encoding,
            "rank": None if plan.encoding == "folded" else plan.rank,
            "dtype": None if plan.encoding == "folded" else plan.dtype,
            "num_modules": len(plan.modules),
            "num_bytes": None if plan.encoding == "folded" else plan.num_bytes,
            "shares_basis": plan.shares_basis,
            "base": plan.base.model_dump(mode="json"),
            **({} if plan.on is None else {"on": plan.on.model_dump(), "includes_on": plan.on_folder is not None}),
            "vllm_max_lora_rank": None if plan.encoding == "folded" else plan.vllm_max_lora_rank,
        }
    )


def _show_soup(out: Path, *, as_json: bool) -> None:
    from personalized_soups.adapters.provenance import read_soup_record

    record = read_soup_record(out)
    assert record is not None
    if as_json:
        render.show_json({"folder": str(out), **record.model_dump(mode="json")})
        return
    shown: dict[str, Any] = {
        "folder": str(out),
        "soup": " + ".join(f"{expert.weight:g} {expert.name}" for expert in record.experts),
        **adapter_facts(record),
        "method": record.method + "".join(f", {name} {value:g}" for name, value in record.options.items()),
        "encoding": record.encoding,
        "dtype": record.dtype,
    }
    if record.kind == "adapter":
        shown["rank"] = record.rank
        most = record.vllm_max_lora_rank
        shown["vLLM"] = "cannot load this" if most is None else f"--max-lora-rank {most}"
    if record.truncation is not None:
        shown["truncation error"] = f"{record.truncation.total:.3g} of the delta's norm"
        worst = max(record.truncation.modules.items(), key=lambda item: item[1])
        shown["worst module"] = f"{worst[1]:.3g} of the norm of {worst[0]}"
    if record.untied is not None:
        shown["untied"] = f"{record.untied} is now a tensor of its own (tie_word_embeddings: false)"
    render.show_record(shown)
