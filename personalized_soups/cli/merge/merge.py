"""`psoups merge`: the experts of a library, merged for one user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.merge.options import (
    AsJson,
    Base,
    Density,
    Device,
    Dtype,
    Energy,
    Epsilon,
    Experts,
    Lambda,
    MethodName,
    Rank,
    SameBase,
    Seed,
    Target,
    check_one_base,
    checked_copy_mode,
    checked_experts,
    given_options,
)
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.adapters.provenance import SoupRecord
    from personalized_soups.declare.profile import Profile
    from personalized_soups.merging.planning.plan import MergePlan


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="merge")(merge)


def merge(
    profile: Annotated[Path | None, typer.Argument(help="Profile file, YAML or JSON.")] = None,
    *,
    experts: Experts = None,
    out: Annotated[Path | None, typer.Option(help="New folder to write.", show_default=False)] = None,
    weights: Annotated[
        str | None, typer.Option(help="Mixing weights in place of a profile: a=0.6,b=0.6.", show_default=False)
    ] = None,
    method: MethodName = None,
    density: Density = None,
    epsilon: Epsilon = None,
    lambda_: Lambda = None,
    seed: Seed = None,
    rank: Rank = None,
    energy: Energy = None,
    target: Target = "peft",
    device: Device = "auto",
    dtype: Dtype = None,
    base: Base = None,
    into_base: Annotated[
        str | None, typer.Option(help="Fold the soup into this base model and write a full model.")
    ] = None,
    untouched: Annotated[
        str, typer.Option(help="Weight files that the soup leaves as they are: copy, reflink or link (hard link).")
    ] = "copy",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that psoups wrote.")] = False,
    durable: Annotated[
        bool, typer.Option("--durable", help="Have all bytes on the disk before the output appears.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")] = False,
    same_base: SameBase = False,
    allow_opposed: Annotated[
        bool, typer.Option("--allow-opposed", help="Take weights on two sides of one dimension.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge experts for one user into a LoRA adapter, or into a full model with --into-base."""
    folders = checked_experts(experts)
    if out is None and not dry_run:
        raise UsageError("no output is given", where="--out", mend="give --out FOLDER, or --dry-run")
    check_one_base(base, into_base)
    copy_mode = checked_copy_mode(untouched)
    declared = _profile(profile, weights, allow_opposed=allow_opposed)

    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.planning.plan import plan_merge

    library = ExpertLibrary.open(*folders)
    # planned here even where a merge plans again: what is out of place is told before anything heavy is imported
    plan = plan_merge(
        library,
        declared,
        method=method,
        options=given_options(density=density, epsilon=epsilon, lambda_=lambda_, seed=seed),
        rank=rank,
        energy=energy,
        dtype=dtype,
        target=target,
        same_base=same_base,
        into_base=into_base is not None,
        base=None if base is None else resolve_base(base),
    )
    if dry_run or out is None:
        _check_rest(library, plan, out, device, into_base, overwrite=overwrite)
        _show_plan(plan, as_json=as_json)
        return
    if into_base is None:
        from personalized_soups.merging.planning.plan import arithmetic_device
        from personalized_soups.merging.writing.adapter import MergedAdapter

        MergedAdapter(plan, library, arithmetic_device(plan, device)).write(out, overwrite, durable)
    else:
        from personalized_soups.merging.writing.into_base import fold_plans

        with render.progress("folding", quiet=as_json) as bar:
            fold_plans(
                library,
                [plan],
                [out],
                resolve_base(into_base),
                device=device,
                same_base=same_base,
                overwrite=overwrite,
                durable=durable,
                untouched=copy_mode,
                progress=lambda done, total: bar.update(done >> 20, total=max(total >> 20, 1)),
            )
    from personalized_soups.adapters.provenance import read_soup_record

    record = read_soup_record(out)
    assert record is not None
    _show_soup(out, record, as_json=as_json)


def _profile(path: Path | None, weights: str | None, *, allow_opposed: bool) -> Profile:
    if (path is None) == (weights is None):
        found = "neither is given" if path is None else "both are given"
        raise UsageError(
            f"give a profile file or --weights, exactly one: {found}",
            where="PROFILE, --weights",
            mend="write psoups merge me.yaml ..., or psoups merge --weights elementary=0.6,concise=0.6 ...",
        )
    from personalized_soups.declare.profile import Profile, load_profile

    if path is not None:
        declared = load_profile(path)
        return declared.replaced(allow_opposed=True) if allow_opposed else declared
    assert weights is not None
    return Profile.from_option(weights, allow_opposed=allow_opposed)


def _check_rest(
    library: ExpertLibrary, plan: MergePlan, out: Path | None, device: str, into_base: str | None, *, overwrite: bool
) -> None:
    """Raise what a run would, where headers tell it: a dry run that passes would be worth little else."""
    from personalized_soups.bank.expert_bank import ExpertBank
    from personalized_soups.files.atomic import check_replaceable
    from personalized_soups.merging.planning.plan import resolve_device
    from personalized_soups.merging.writing.adapter import check_output_apart

    resolve_device(device)
    if out is not None:
        check_replaceable(out.absolute(), overwrite=overwrite)
        check_output_apart(out, [expert.folder for expert in plan.experts])
    if plan.base_folder is not None:
        from personalized_soups.merging.computing.whole_tensors import on_base

        on_base([plan], ExpertBank([library[expert.name] for expert in plan.experts]))
    if into_base is not None:
        from personalized_soups.merging.writing.into_base import check_fits

        check_fits(library, plan, resolve_base(into_base))


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
            "vllm_max_lora_rank": None if plan.encoding == "folded" else plan.vllm_max_lora_rank,
        }
    )


def _show_soup(out: Path, record: SoupRecord, *, as_json: bool) -> None:
    if as_json:
        render.show_json({"folder": str(out), **record.model_dump(mode="json")})
        return
    shown: dict[str, Any] = {
        "folder": str(out),
        "soup": " + ".join(f"{expert.weight:g} {expert.name}" for expert in record.experts),
        "method": record.method + "".join(f", {name} {value:g}" for name, value in record.options.items()),
        "encoding": record.encoding,
        "dtype": record.dtype,
    }
    if record.kind == "adapter":
        shown["rank"] = record.rank
        most = record.vllm_max_lora_rank
        shown["vLLM"] = "it does not load this" if most is None else f"--max-lora-rank {most}"
    if record.truncation is not None:
        shown["truncation error"] = f"{record.truncation.total:.3g} of the delta's norm"
        worst = max(record.truncation.modules.items(), key=lambda item: item[1])
        shown["worst module"] = f"{worst[1]:.3g} of the norm of {worst[0]}"
    if record.untied is not None:
        shown["untied"] = f"{record.untied} is now a tensor of its own (tie_word_embeddings: false)"
    render.show_record(shown)
