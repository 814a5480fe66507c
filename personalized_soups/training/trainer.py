"""Configure TRL's DPOTrainer from a recipe. The trainer is silent and exactly resumable."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from peft import LoraConfig, TaskType
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import RunError
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.training import checkpoints
from personalized_soups.training.encoding import EncodedPairs
from personalized_soups.training.order import LikeLengthOrder
from personalized_soups.training.progress import StepReport, TrainingProgress
from personalized_soups.training.shared_basis import freeze_basis, set_shared_basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_CHECKPOINTS_KEPT = 2  # two, because a kill may leave the last checkpoint incomplete
# The reference pass stores no activations, so that one of its batches can hold this many training batches.
REFERENCE_BATCHES = 4


class ExpertTrainer(DPOTrainer):
    """A DPOTrainer that puts pairs of similar length in a batch. It writes no model card and sends no telemetry.

    Args:
        recipe: the recipe, with the overrides of the side.
        model: the base. PEFT wraps it in place.
        tokenizer: the base's tokenizer.
        pairs: the pairs as token ids.
        config: the configuration that `trainer_config` returns.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: EncodedPairs,
        config: DPOConfig,
    ) -> None:
        self._recipe = recipe
        self._order: LikeLengthOrder | None = None
        # TRL turns off all dropout or none. This call turns off the base's dropout. PEFT adds LoRA's dropout later.
        disable_dropout_in_model(model)
        super().__init__(
            model,
            args=config,
            # The data set stays in memory, because a cache on disk could pass the data of one training to another.
            train_dataset=datasets.Dataset.from_dict(self.columns(pairs)),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Epochs(self))
        if recipe.basis == "shared":
            set_shared_basis(self.model, recipe.basis_seed)

    def columns(self, pairs: EncodedPairs) -> dict[str, list[Any]]:
        """Return the columns of the data set."""
        return pairs.columns()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the pairs."""
        if self._order is not None:
            self._order.epoch = epoch

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Freeze a shared basis, which loading a checkpoint makes trainable, and then make the optimizer."""
        if self._recipe.basis == "shared":
            freeze_basis(self.model)
        return super().create_optimizer(*args, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write no model card, because expert.json records the training."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Return the data set unchanged, because `encode_pairs` has already computed TRL's token ids."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengthOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        longest = [max(len(chosen), len(rejected)) for chosen, rejected in answers]
        lengths = [len(prompt) + answer for prompt, answer in zip(rows["prompt_ids"], longest, strict=True)]
        self._order = LikeLengthOrder(lengths, batch_size=self.args.per_device_train_batch_size, seed=self.args.seed)
        return self._order


class _Epochs(TrainerCallback):
    def __init__(self, trainer: ExpertTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # If a training resumes within an epoch, `state.epoch` has a fraction.
        self._trainer.set_epoch(math.floor(state.epoch or 0))


class Reporting(TrainerCallback):
    """Passes the figures of every step to a TrainingProgress. Only the first process reports."""

    def __init__(self, side: str, progress: TrainingProgress) -> None:
        self._side, self._progress = side, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the number of finished steps and of all steps."""
        if state.is_world_process_zero:
            self._progress.begin(self._side, step=state.global_step, num_steps=state.max_steps)

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
                where=self._side,
                mend="lower optimizer.learning_rate in the recipe, e.g. to half its value",
            )
        if state.is_world_process_zero:
            report = StepReport(
                step=state.global_step,
                num_steps=state.max_steps,
                loss=logs["loss"],
                margin=logs["rewards/margins"],
                accuracy=logs["rewards/accuracies"],
                learning_rate=logs["learning_rate"],
            )
            self._progress.advance(self._side, report)


class Marking(TrainerCallback):
    """Marks each checkpoint as complete once all processes have written their parts of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint of this step."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoints.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def trainer_config(
    recipe: TrainingRecipe, *, partial: Path, device: torch.device, num_pairs: int, model_dtype: torch.dtype, seed: int
) -> DPOConfig:
    """Return TRL's configuration for a recipe.

    With one process and more than one epoch, the reference log-probabilities are computed once, before the steps. For a
    single epoch, computing them in each step costs the same. Several processes also compute them in each step, because
    they would all use the same file for them.
    """
    optimizer = recipe.optimizer
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    seen_per_step = optimizer.batch_size * optimizer.gradient_accumulation * num_processes
    epochs = optimizer.epochs or (optimizer.max_steps or 0) * seen_per_step / num_pairs
    on_cpu = device.type == "cpu"
    config = DPOConfig(
        output_dir=str(partial),
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=model_dtype == torch.bfloat16,
        fp16=model_dtype == torch.float16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        loss_type=["sigmoid", "sft"] if recipe.dpo.sft_weight else ["sigmoid"],
        loss_weights=[1.0, recipe.dpo.sft_weight] if recipe.dpo.sft_weight else [1.0],
        beta=recipe.dpo.beta,
        max_length=recipe.dpo.max_length,
        disable_dropout=False,
        precompute_ref_log_probs=num_processes == 1 and epochs > 1,
        precompute_ref_batch_size=REFERENCE_BATCHES * optimizer.batch_size,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        lr_scheduler_type=_SCHEDULES[optimizer.schedule],
        warmup_steps=optimizer.warmup_steps,
        max_grad_norm=optimizer.max_grad_norm,
        num_train_epochs=optimizer.epochs or 1,
        max_steps=optimizer.max_steps or -1,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=_CHECKPOINTS_KEPT,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=not on_cpu,
        seed=seed,
    )
    if num_processes == 1 and config.n_gpu > 1:
        # With several GPUs in one process, Trainer would use DataParallel, which TRL rejects.
        config._n_gpu = 1
    return config


def lora_config(recipe: TrainingRecipe) -> LoraConfig:
    """Return PEFT's LoRA configuration for a recipe."""
    lora = recipe.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type] # PEFT accepts floats
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        use_rslora=lora.rslora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


@contextmanager
def quiet_training() -> Iterator[None]:
    """Hide the progress bars and messages of transformers, datasets and TRL while the block runs."""
    were_disabled = datasets.are_progress_bars_disabled()
    tqdm = os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with quiet_transformers():
            yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
        if tqdm is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm
