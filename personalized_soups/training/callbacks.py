"""Callbacks of TRL's trainers: reports of progress, complete checkpoints, and the order of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from personalized_soups.errors import RunError
from personalized_soups.training import checkpoints
from personalized_soups.training.progress import StepReport, TrainingProgress


class Epochs(TrainerCallback):
    """Tells the order of the examples which epoch begins."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self._set_epoch = set_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch."""
        # If a training resumes within an epoch, `state.epoch` has a fraction.
        self._set_epoch(math.floor(state.epoch or 0))


class Reporting(TrainerCallback):
    """Passes the figures of every step to a TrainingProgress. Only the first process reports.

    Args:
        name: the name under which the training is reported.
        progress: receives the reports.
        logged: the figures to report besides the loss, by their names in the trainer's log.
    """

    def __init__(self, name: str, progress: TrainingProgress, logged: Mapping[str, str]) -> None:
        self._name, self._progress, self._logged = name, progress, logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the number of finished steps and of all steps."""
        if state.is_world_process_zero:
            self._progress.begin(self._name, step=state.global_step, num_steps=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Report a step.

        Raises:
            RunError: if the loss or the norm of the gradient is not finite.
        """
        if not logs or "loss" not in logs:
            return  # the summary at the end
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise RunError(
                f"the training diverged: at step {state.global_step}, the loss is {logs['loss']} "
                f"and the norm of the gradient is {logs.get('grad_norm')}",
                where=self._name,
                mend="lower optimizer.learning_rate in the recipe, e.g. to half its value",
            )
        if state.is_world_process_zero:
            report = StepReport(
                step=state.global_step,
                num_steps=state.max_steps,
                loss=logs["loss"],
                figures={name: logs[key] for name, key in self._logged.items() if key in logs},
                learning_rate=logs["learning_rate"],
            )
            self._progress.advance(self._name, report)


class Marking(TrainerCallback):
    """Marks each checkpoint as complete once all processes have written their parts of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint of this step."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoints.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
