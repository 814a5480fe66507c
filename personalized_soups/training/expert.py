"""Training one expert: preference pairs and a frozen base in, a PEFT adapter folder with expert.json out."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import (
    BaseRecord,
    DataRecord,
    ExpertRecord,
    library_versions,
    read_expert_record,
    write_record,
)
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import DeclarationError, InputError, OutputExistsError, RunError, check_extra
from personalized_soups.files.atomic import check_replaceable, new_folder
from personalized_soups.files.file_names import CONFIG_FILE, EXPERT_FILE, WEIGHTS_FILE
from personalized_soups.generation.loading import (
    choose_device,
    load_base,
    load_tokenizer,
)
from personalized_soups.training import checkpoints
from personalized_soups.training.data import Preferences, read_preferences
from personalized_soups.training.processes import is_first_process, on_first_process, wait_for_all
from personalized_soups.training.progress import Silent, TrainingProgress

if TYPE_CHECKING:
    from personalized_soups.training.trainer import ExpertTrainer

# The figures of expert.json are means over the last steps: a single batch says little.
_STEPS_OF_METRICS = 10


@dataclass(frozen=True, slots=True)
class _Order:
    """What is asked for, checked as far as it goes without the model."""

    side: str
    base: str | Path
    out: Path
    recipe: TrainingRecipe
    preferences: Preferences
    record: ExpertRecord


def train_expert(
    side: str,
    *,
    base: str | Path,
    data: Path,
    out: Path,
    recipe: TrainingRecipe,
    catalogue: Catalogue | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train the expert of one side by DPO on a frozen base, and return its folder.

    Args:
        side: the side of a preference dimension that the pairs favour.
        base: the base model: a folder or a hub id.
        data: preference pairs in TRL's format, JSON lines.
        out: the folder to write: adapter_config.json, adapter_model.safetensors, expert.json.
        recipe: every hyper-parameter; the overrides of `side` are put in.
        catalogue: names the side's dimension, and refuses a side that it does not have.
        device: `auto`, `cpu` or `cuda`. Under torchrun each process takes its own.
        seed: of LoRA's start and of the order of the pairs. On one machine and thread count the same seed gives the
            same bytes.
        resume: go on from the last complete checkpoint, with the same result as without the interruption; start
            where there is none; return at once where `out` is this very expert already.
        progress: hears of every step.

    Raises:
        SoupError: input at fault, a folder in the way, another run that writes to `out`, a diverging loss, a full disk
            or GPU.
    """
    progress = progress or Silent()
    dimension = catalogue.side(side)[0] if catalogue is not None else None
    preferences = read_preferences(data)
    recipe = recipe.for_side(side)
    record = ExpertRecord(
        side=side,
        dimension=dimension,
        base=BaseRecord(name=str(base), fingerprint=None),
        recipe=recipe.model_dump(mode="json", exclude={"sides"}),
        basis=recipe.basis,
        data=DataRecord(name=data.name, blake3=preferences.blake3, num_pairs=len(preferences.pairs)),
        seed=seed,
        versions=library_versions("torch", "transformers", "peft", "trl"),
        files=(CONFIG_FILE, WEIGHTS_FILE),
    )
    order = _Order(side, base, out, recipe, preferences, record)
    with ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(checkpoints.held(out)))
        if resume and on_first_process(lambda: _is_same(read_expert_record(out), record)):
            partial = checkpoints.partial_folder(out)
            # a kill between the expert's last rename and the end leaves checkpoints that nobody needs
            on_first_process(lambda: checkpoints.remove(partial))
            if is_first_process():
                progress.note(side, f"{out} is this expert already")
            return out
        on_first_process(lambda: _check_free(out, resume=resume))
        with _clear_faults(order):
            _train(order, device=device, resume=resume, progress=progress)
    return out


def _train(order: _Order, *, device: str, resume: bool, progress: TrainingProgress) -> None:
    check_extra("train", "trl", "datasets", "accelerate")
    from personalized_soups.training.trainer import Marking, Reporting, quiet_training

    partial = checkpoints.partial_folder(order.out)
    with quiet_training():
        trainer, changes = _build(order, partial=partial, device=device, progress=progress)
        fingerprint = on_first_process(lambda: base_fingerprint(order.base))
        base = BaseRecord(name=str(order.base), fingerprint=fingerprint)
        record = order.record.model_copy(update={"base": base})
        run = {**record.model_dump(mode="json"), "num_processes": trainer.args.world_size, **changes}
        checkpoint = on_first_process(lambda: checkpoints.prepare(partial, run, resume=resume))
        trainer.add_callback(Reporting(order.side, progress))
        trainer.add_callback(Marking())
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            record = record.model_copy(update={"metrics": _metrics(trainer.state.log_history)})
            on_first_process(lambda: _write(trainer.model, record, order.out))
        except BaseException:
            if trainer.args.process_index == 0:
                checkpoints.remove_if_useless(partial)
            raise
        on_first_process(lambda: checkpoints.remove(partial))
        wait_for_all()
    if trainer.args.process_index == 0:
        progress.end(order.side)


def _build(
    order: _Order, *, partial: Path, device: str, progress: TrainingProgress
) -> tuple[ExpertTrainer, dict[str, Any]]:
    """Return the trainer, and what decides about resuming beside the record."""
    import torch

    from personalized_soups.generation.generator import num_embeddings, pad_id, stop_ids
    from personalized_soups.training.encoding import check_pairs, encode_pairs
    from personalized_soups.training.trainer import ExpertTrainer, trainer_config

    chosen = choose_device(device)
    tokenizer = load_tokenizer(order.base)
    if order.preferences.conversational and tokenizer.chat_template is None:
        raise InputError(
            "the pairs are conversations, and the base's tokenizer has no chat template",
            where=str(order.preferences.path),
            mend="write the pairs as plain text, or give the tokenizer a chat template",
        )
    encoded = encode_pairs(order.preferences, tokenizer, max_length=order.recipe.dpo.max_length)
    model = load_base(order.base, device=torch.device("cpu"), dtype=order.recipe.dtype)
    config = trainer_config(
        order.recipe,
        partial=partial,
        device=chosen,
        num_pairs=len(order.preferences.pairs),
        model_dtype=model.dtype,
        seed=order.record.seed or 0,
    )
    check_pairs(encoded, tokenizer, num_embeddings(model))
    pad = pad_id(tokenizer, num_embeddings(model))
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    trainer = ExpertTrainer(order.recipe, model=model, tokenizer=tokenizer, pairs=encoded, config=config)
    if config.process_index == 0:
        notes = encoded.notes(tokenizer, stop_ids(model, tokenizer))
        if not order.preferences.conversational and tokenizer.chat_template is not None:
            notes.append("the pairs are plain text and are trained as they are, without the tokenizer's chat template")
        for note in notes:
            progress.note(order.side, note)
    return trainer, encoded.changes()


def _write(model: Any, record: ExpertRecord, out: Path) -> None:
    """Write the expert's folder, all or nothing; equal trainings write equal bytes."""
    with new_folder(out) as scratch:
        model.save_pretrained(str(scratch), save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)
        config_path = scratch / CONFIG_FILE
        config = json.loads(config_path.read_text(encoding="utf-8"))
        # PEFT writes a set in the order of this process's string hashes.
        config["target_modules"] = sorted(config["target_modules"])
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_record(scratch, record)
        # safetensors writes 0600 whatever the umask says; the record has the mode that the umask gives.
        mode = (scratch / EXPERT_FILE).stat().st_mode & 0o777
        (scratch / WEIGHTS_FILE).chmod(mode)


def _metrics(history: list[dict[str, float]]) -> dict[str, float]:
    steps = [entry for entry in history if "loss" in entry][-_STEPS_OF_METRICS:]
    names = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    means = {name: math.fsum(entry[key] for entry in steps) / len(steps) for name, key in names.items()}
    return {**means, "num_steps": float(steps[-1]["step"])}


def _is_same(found: ExpertRecord | None, wanted: ExpertRecord) -> bool:
    """Return whether an expert that is there came from the same training, as far as its record says."""
    if found is None:
        return False
    aside = {"base", "metrics"}
    if found.base.name != wanted.base.name or found.model_dump(exclude=aside) != wanted.model_dump(exclude=aside):
        return False
    return found.base.fingerprint == base_fingerprint(found.base.name or "")


def _check_free(out: Path, *, resume: bool) -> None:
    """Raise OutputExistsError if `out` is there: a training replaces nothing."""
    try:
        check_replaceable(out, overwrite=False)
    except OutputExistsError as error:
        another = "; it is not this expert: side, base, data, recipe, seed or versions differ" if resume else ""
        raise OutputExistsError(
            f"{error.what}{another}", where=error.where, mend="choose another output folder, or delete this one"
        ) from error


@contextmanager
def _clear_faults(order: _Order) -> Iterator[None]:
    """Turn what torch, PEFT and safetensors raise for a full disk, a full GPU or unknown modules into our errors."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise RunError(
            "the GPU's memory is full",
            where=order.side,
            mend="lower optimizer.batch_size and raise optimizer.gradient_accumulation, or set gradient_checkpointing",
        ) from fault
    except Exception as fault:
        if _is_full_disk(fault):
            raise RunError(
                "no space is left on the device",
                where=str(order.out.parent),
                mend="free some space and pass resume=True to go on from the last whole checkpoint",
            ) from fault
        if isinstance(fault, ValueError) and ("arget modules" in str(fault) or "`lm_head`" in str(fault)):
            raise DeclarationError(
                f"these modules can't be adapted: {fault}",
                where=order.recipe.place("lora", "target_modules"),
                mend="write all-linear, or names of linear layers inside the base, e.g. [q_proj, v_proj]",
            ) from fault
        raise


def _is_full_disk(fault: BaseException) -> bool:
    """Return whether a library's error tells of a full disk; safetensors and torch hide the number in the text."""
    told = str(fault)
    signs = (
        "No space left on device",
        "os error 28",
        os.strerror(errno.EDQUOT),
        "PytorchStreamWriter failed writing file",
        "inline_container.cc",  # the same, met when the file is closed: "unexpected pos 125312 vs 125200"
    )
    return any(sign in told for sign in signs)
