"""Run one training from its arguments to its folder: hold the folder, train, resume, and write all or nothing."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import BaseRecord, ExpertRecord, read_expert_record, write_record
from personalized_soups.declare.training import AdapterRecipe
from personalized_soups.errors import DeclarationError, OutputExistsError, RunError, check_extra
from personalized_soups.files.atomic import check_replaceable, new_folder
from personalized_soups.files.file_names import CONFIG_FILE, EXPERT_FILE, WEIGHTS_FILE
from personalized_soups.training import checkpoints
from personalized_soups.training.processes import is_first_process, on_first_process, wait_for_all
from personalized_soups.training.progress import TrainingProgress
from personalized_soups.training.shared_basis import unfold_cores

# The figures in expert.json are means over this many last steps, because the figures of a single batch vary too much.
_STEPS_OF_METRICS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The arguments of a training. They are checked as far as possible without the model.

    Each kind of training is a subclass that makes TRL's trainer and writes what it has trained.

    Attributes:
        name: the name under which progress is reported.
        base: the base model: a folder or a hub id.
        out: the folder to write.
        recipe: the recipe, with the overrides of the side.
        record: the record of the folder, without the base's fingerprint and the metrics.
        on: the adapter on top of which the adapter is trained; None for the base alone.
    """

    name: str
    base: str | Path
    out: Path
    recipe: AdapterRecipe
    record: ExpertRecord
    on: BaseAdapter | None = None

    # The figures of a step that the record holds, by their names in the trainer's log.
    logged: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def build(self, *, partial: Path, device: str, progress: TrainingProgress) -> tuple[Any, dict[str, Any]]:
        """Return TRL's trainer, and the facts that a resumed training must share in addition to the record.

        Args:
            partial: the folder of the checkpoints.
            device: as for `train_expert`.
            progress: receives notes on the data.
        """
        raise NotImplementedError

    def write(self, trainer: Any, folder: Path, record: ExpertRecord) -> None:
        """Write the files of `folder`: the adapter and its record. Equal trainings write equal bytes."""
        unfold_cores(trainer.model)
        trainer.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        config_path = folder / CONFIG_FILE
        config = json.loads(config_path.read_text(encoding="utf-8"))
        # PEFT writes a set. Its order depends on the string hashes of this process.
        config["target_modules"] = sorted(config["target_modules"])
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_record(folder, record)


def run_training(training: Training, *, device: str, resume: bool, progress: TrainingProgress) -> Path:
    """Train, write the folder `training.out`, and return it. The arguments are those of `train_expert`.

    Raises:
        SoupError: in the same cases as `train_expert`.
    """
    out = training.out
    with ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(checkpoints.held(out)))
        if resume and on_first_process(lambda: _is_same(read_expert_record(out), training.record)):
            partial = checkpoints.partial_folder(out)
            # A kill right after the expert was written leaves checkpoints that no run needs.
            on_first_process(lambda: checkpoints.remove(partial))
            if is_first_process():
                progress.note(training.name, f"{out} already holds this expert")
            return out
        on_first_process(lambda: _check_free(out, resume=resume))
        with _clear_errors(training):
            _train(training, device=device, resume=resume, progress=progress)
    return out


def _train(training: Training, *, device: str, resume: bool, progress: TrainingProgress) -> None:
    check_extra("train", "trl", "datasets", "accelerate")
    from personalized_soups.training.callbacks import Marking, Reporting
    from personalized_soups.training.trl_settings import quiet_training

    partial = checkpoints.partial_folder(training.out)
    with quiet_training():
        trainer, changes = training.build(partial=partial, device=device, progress=progress)
        fingerprint = on_first_process(lambda: base_fingerprint(training.base))
        base = BaseRecord(name=str(training.base), fingerprint=fingerprint)
        record = training.record.model_copy(update={"base": base})
        run = {**record.model_dump(mode="json"), "num_processes": trainer.args.world_size, **changes}
        checkpoint = on_first_process(lambda: checkpoints.prepare(partial, run, resume=resume))
        trainer.add_callback(Reporting(training.name, progress, training.logged))
        trainer.add_callback(Marking())
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            record = record.model_copy(update={"metrics": _metrics(training, trainer.state.log_history)})
            on_first_process(lambda: _write(training, trainer, record))
        except BaseException:
            if trainer.args.process_index == 0:
                checkpoints.remove_if_useless(partial)
            raise
        on_first_process(lambda: checkpoints.remove(partial))
        wait_for_all()
    if trainer.args.process_index == 0:
        progress.end(training.name)


def _write(training: Training, trainer: Any, record: ExpertRecord) -> None:
    """Write the folder. It appears only when it is complete."""
    with new_folder(training.out) as scratch:
        training.write(trainer, scratch, record)
        # safetensors ignores the umask and writes mode 0600. The record file has the mode that the umask gives.
        mode = (scratch / EXPERT_FILE).stat().st_mode & 0o777
        (scratch / WEIGHTS_FILE).chmod(mode)


def _metrics(training: Training, history: list[dict[str, float]]) -> dict[str, float]:
    steps = [entry for entry in history if "loss" in entry][-_STEPS_OF_METRICS:]
    means = {
        name: math.fsum(entry[key] for entry in steps) / len(steps)
        for name, key in {"loss": "loss", **training.logged}.items()
        if key in steps[-1]
    }
    return {**means, "num_steps": float(steps[-1]["step"])}


def _is_same(existing: ExpertRecord | None, wanted: ExpertRecord) -> bool:
    """Return whether `existing` records the same training with an unchanged base. Metrics are not compared."""
    if existing is None or existing.base.name != wanted.base.name:
        return False
    known_later = {"base", "metrics"}
    if existing.model_dump(exclude=known_later) != wanted.model_dump(exclude=known_later):
        return False
    return existing.base.fingerprint == base_fingerprint(existing.base.name or "")


def _check_free(out: Path, *, resume: bool) -> None:
    """Raise OutputExistsError if `out` exists, because a training replaces no folder."""
    try:
        check_replaceable(out, overwrite=False)
    except OutputExistsError as error:
        reason = (
            ", but its side, base, adapter, data, recipe, seed or versions differ from those of this training"
            if resume
            else ""
        )
        raise OutputExistsError(
            f"{error.what}{reason}", where=error.where, mend="choose another output folder, or delete this folder"
        ) from error


@contextmanager
def _clear_errors(training: Training) -> Iterator[None]:
    """Raise a SoupError for library errors on a full disk, full GPU memory or modules that LoRA cannot adapt."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU has run out of memory",
            where=training.name,
            mend="in the recipe, halve optimizer.batch_size and double optimizer.gradient_accumulation, or write "
            "gradient_checkpointing: true",
        ) from error
    except Exception as error:
        if _is_full_disk(error):
            raise RunError(
                "no space is left on the device",
                where=str(training.out.parent),
                mend="free some space, then pass resume=True to continue from the last complete checkpoint",
            ) from error
        if isinstance(error, ValueError) and ("arget modules" in str(error) or "`lm_head`" in str(error)):
            raise DeclarationError(
                f"LoRA cannot adapt these modules: {error}",
                where=training.recipe.place("lora", "target_modules"),
                mend="write all-linear, or the names of linear layers of the base, e.g. [q_proj, v_proj]",
            ) from error
        raise


def _is_full_disk(error: BaseException) -> bool:
    """Return whether a library's error means a full disk. safetensors and torch give the error number only as text."""
    message = str(error)
    signs = (
        "No space left on device",
        "os error 28",
        os.strerror(errno.EDQUOT),
        "PytorchStreamWriter failed writing file",
        "inline_container.cc",  # torch, when it closes the file: "unexpected pos 125312 vs 125200"
    )
    return any(sign in message for sign in signs)
