"""`AdapterTrainer`: what this package changes in every trainer of TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import PrinterCallback

from personalized_soups.declare.training import AdapterRecipe
from personalized_soups.training.callbacks import Epochs
from personalized_soups.training.order import GroupOrder, LikeLengthOrder
from personalized_soups.training.shared_basis import freeze_basis, set_core_basis, set_shared_basis

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class AdapterTrainer(_Base):
    """A mixin for a trainer of TRL, which comes before it among the bases of a class.

    The trainer prints nothing, writes no model card and sends no telemetry. It takes the data set as it is, because its
    columns hold token ids already. The order of the examples depends only on the seed and the epoch, so a resumed
    training gets the batches of an uninterrupted one.

    A subclass sets `recipe` before it calls TRL's `__init__`, and calls `finish` after it.
    """

    recipe: AdapterRecipe
    order: LikeLengthOrder | GroupOrder | None = None

    def finish(self) -> None:
        """Remove what prints, follow the epochs, draw a shared basis, and train in float32.

        PEFT keeps LoRA's factors in float32, but not an output layer, and bfloat16 rounds its small updates to nothing.
        """
        model: Any = self.model
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.remove_callback(PrinterCallback)
        self.add_callback(Epochs(self.set_epoch))
        if self.recipe.basis == "shared":
            set_shared_basis(model, self.recipe.basis_seed)
        elif self.recipe.basis == "core":
            set_core_basis(model, self.recipe.basis_seed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the examples."""
        if self.order is not None:
            self.order.epoch = epoch

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Freeze a shared basis, which loading a checkpoint makes trainable, and then make the optimizer."""
        if self.recipe.basis != "free":
            freeze_basis(self.model)
        return super().create_optimizer(*args, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write no model card, because expert.json records the training."""

    def by_length(self, lengths: list[int]) -> LikeLengthOrder:
        """Return, and follow, an order that puts examples of similar length in a batch.

        Args:
            lengths: the number of tokens of each example.
        """
        self.order = LikeLengthOrder(lengths, batch_size=self.args.per_device_train_batch_size, seed=self.args.seed)
        return self.order

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Return the data set unchanged, because its token ids are already computed."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""
