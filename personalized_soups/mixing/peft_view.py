"""A SoupModel with the type and calls of a PeftModel, for code that expects one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peft import PeftConfig, PeftModel
from torch import nn

from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError
from personalized_soups.mixing.batch_rows import profile_per_prompt, rows_per_prompt

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel

# PEFT's name for "no adapter" in `adapter_names`.
_BASE = "__base__"


class _RejectedCalls:
    """The calls of a PeftModel that make, write or fold in adapters: a mixed model rejects them."""

    def add_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Reject: experts are trained elsewhere."""
        raise _rejected(
            "add_adapter",
            "train with psoups train, or with PEFT on the bare base, and call load_adapter with the folder",
        )

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Reject: the experts are files already."""
        raise _rejected("save_pretrained", "copy the experts' folders, or write a soup of them with psoups merge")

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Reject: the model in memory serves all users."""
        raise _rejected("merge_and_unload", "write a merged model with psoups merge, or use LiveAdapter for one soup")


class PeftView(_RejectedCalls, PeftModel):
    """A SoupModel with the type and calls of a PeftModel that has loaded all experts. Nothing is copied.

    The adapters are the model's experts and its named profiles. `adapter_names` mixes a batch as in PEFT, but at the
    cost of one adapter. `add_weighted_adapter` makes a profile, which takes a few numbers. Calls that train, save or
    merge adapters are rejected.

    Args:
        soup: the model.

    Example:
        >>> model = PeftView(SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu"))
        >>> model.add_weighted_adapter(["friendly", "concise"], [0.6, 0.4], "soup", combination_type="cat")
        >>> model.set_adapter("soup")
        >>> model.active_adapters
        ['soup']
    """

    def __init__(self, soup: SoupModel) -> None:
        # Not PeftModel.__init__, which would wrap every layer.
        nn.Module.__init__(self)
        self.peft_type = "LORA"
        # PeftModel's own methods look these up.
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        # Set past nn.Module: the model's modules are registered once, under `base_model`.
        object.__setattr__(self, "soup", soup)
        self._tuner = _Tuner(soup)
        self.base_model = self._tuner

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that answer while no batch is mixed."""
        served = self.soup.served
        # A served profile is the object of its name: equal weights under another name are another object.
        named = [name for name, weights in self.soup.profiles.items() if weights is served.weights]
        return named[:1] or served.experts

    @property
    def active_adapter(self) -> Any:  # type: ignore[override]
        """The active adapter, or a list if there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def forward(self, *arguments: Any, adapter_names: Sequence[str] | None = None, **keywords: Any) -> Any:
        """Run the model's forward pass. With `adapter_names`, each row has its own adapter, or none (`__base__`)."""
        if adapter_names is None:
            return self.soup.model(*arguments, **keywords)
        with self.soup.mixture(_profiles_of(adapter_names)):
            return self.soup.model(*arguments, **keywords)

    def generate(self, *arguments: Any, adapter_names: Sequence[str] | None = None, **keywords: Any) -> Any:
        """Run the model's own generate. `adapter_names` are as for `forward`, one for each prompt."""
        if adapter_names is None:
            return self.soup.model.generate(*arguments, **keywords)
        inputs: Any = arguments[0] if arguments else keywords.get("input_ids", keywords.get("inputs_embeds"))
        profiles = profile_per_prompt(list(inputs), _profiles_of(adapter_names))
        config = keywords.get("generation_config") or self.soup.model.generation_config
        with self.soup.mixture(profiles, rows_each=rows_per_prompt(keywords, config)):
            return self.soup.model.generate(*arguments, **keywords)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = True) -> None:
        """Make an adapter active, or the sum of several.

        Raises:
            UsageError: for an unknown adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._adapters_disabled = False
        if len(names) == 1 and names[0] in self.soup.profiles:
            self.soup.served.set(names[0])
        else:
            self.soup.served.set_adapters(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the bare base within the block."""
        self._adapters_disabled = True
        try:
            # A mixture and not `served.disable`: it ends with the block, and other threads wait.
            with self.soup.mixture(None):
                yield
        finally:
            self._adapters_disabled = False

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add the weighted sum of experts as a profile: PEFT's `cat`, which is the sum of the deltas.

        Raises:
            DeclarationError: for an unknown expert.
            UsageError: for another combination, the name of an expert, or if the numbers of adapters and weights
                differ.
        """
        if combination_type != "cat" or options:
            request = ", ".join([combination_type, *options])
            raise UsageError(
                f"a mixture is the exact sum of the experts' deltas, not {request}",
                where="combination_type",
                mend="use combination_type='cat' without options, or merge with another method: psoups merge",
            )
        if len(adapters) != len(weights):
            raise UsageError(
                f"{len(weights)} weights for {len(adapters)} adapters",
                where="weights",
                mend="give one weight for each adapter",
            )
        # PEFT sums any adapters, so opposed sides are allowed here.
        table = dict(zip(adapters, map(float, weights), strict=True))
        self.soup.profiles.add(Profile(user=adapter_name, weights=table, allow_opposed=True))

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str, *_: Any, **__: Any
    ) -> None:
        """Add an expert under that name, from the folder of a LoRA adapter. Further options of PEFT have no effect.

        Raises:
            SoupError: as `SoupModel.experts.add`.
        """
        self.soup.experts.add(model_id, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an expert or a named profile.

        Raises:
            UsageError: if there is no adapter of that name.
        """
        if adapter_name in self.soup.profiles:
            # The served profile must not outlive its name.
            if self.active_adapters == [adapter_name]:
                self.soup.served.set(None)
            self.soup.profiles.remove(adapter_name)
        else:
            self.soup.experts.remove(adapter_name)

    def get_base_model(self) -> Any:
        """Return the transformers model, with its layers mixed."""
        return self.soup.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return 0, because nothing is trained here, and the number of the base's parameters."""
        return 0, sum(parameter.numel() for parameter in self.soup.model.parameters())


class _Tuner(nn.Module):
    """The `base_model` of a PeftModel, which has `model` and `peft_config`."""

    def __init__(self, soup: SoupModel) -> None:
        super().__init__()
        object.__setattr__(self, "soup", soup)
        self.model = soup.model

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """The configuration of each expert, by name."""
        configs = {name: PeftConfig.from_pretrained(str(expert.folder)) for name, expert in self.soup.experts.items()}
        # Nothing is trained here.
        for config in configs.values():
            config.inference_mode = True
        return configs

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the model's forward pass."""
        return self.model(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _profiles_of(adapter_names: Sequence[str]) -> list[ProfileLike]:
    return [None if name == _BASE else name for name in adapter_names]


def _rejected(call: str, mend: str) -> UsageError:
    return UsageError(f"a mixed model has no {call}", where=f"PeftView.{call}", mend=mend)
