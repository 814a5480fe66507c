"""The LoRA methods of diffusers' pipelines, for a SoupModel."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.declare.expert_weights import LayerWeights
from personalized_soups.mixing.model import SoupModel
from personalized_soups.mixing.profile_registry import Names


class DiffusersView:
    """A SoupModel with the LoRA methods of diffusers. They choose the experts that are used while no mixture is set.

    As in diffusers, each expert's delta is multiplied by its weight, and the products are added.

    Args:
        soup: the SoupModel.

    Example::

        view = DiffusersView(model)
        view.set_adapters(["friendly", "concise"], [0.6, 0.4])
        model.generate("How do I clean a kettle?")

    Example:
        >>> view = DiffusersView(SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu"))
        >>> view.set_adapters(["friendly", "concise"], [0.6, 0.4])
        >>> view.get_active_adapters()
        ['friendly', 'concise']
    """

    def __init__(self, soup: SoupModel) -> None:
        self.soup = soup

    def set_adapters(self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights] = 1.0) -> None:
        """Answer with the weighted sum of experts.

        Args:
            names: the name of one expert, or a list of names.
            weights: one weight for all named experts, or one weight for each. A weight may differ by layer, as in
                `SoupModel.mixture`.

        Raises:
            UsageError: if an expert is unknown, the numbers of names and weights differ, or a weight does not fit into
                the model's dtype.
            DeclarationError: if a weight is not a finite number, or a pattern matches no layer.
        """
        self.soup.served.set_adapters(names, weights)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the experts that are used while no mixture is set."""
        return self.soup.served.experts

    def disable_adapters(self) -> None:
        """Answer with the bare base until `enable_adapters` or `set_adapters` is called."""
        self.soup.served.disable()

    def enable_adapters(self) -> None:
        """Answer again with the experts that were active before `disable_adapters` was called."""
        self.soup.served.enable()

    def delete_adapters(self, names: Names) -> None:
        """Remove the named experts and free their memory.

        Raises:
            UsageError: if an expert is unknown, or this thread has set a mixture. Then no expert is removed.
        """
        # All names are removed in one call of `change`, so that a wrong name removes nothing.
        self.soup.experts.change([], [names] if isinstance(names, str) else list(names))
