"""A SoupModel as a PeftModel, for code that expects one: its experts and profiles are the adapters."""

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

# PEFT's word for the rows of a mixed batch that have no adapter.
_BASE = "__base__"


class PeftView(PeftModel):
    """What a PeftModel with all experts loaded does, done by the SoupModel behind it; nothing is copied.

    Adapters are the experts and the profiles that the model knows by name. `adapter_names` mixes a batch as PEFT does,
    at the cost of one adapter. `add_weighted_adapter` makes a profile, which costs a few numbers. Training and saving
    are not among it: experts are files already.
    """

    def __init__(self, soup: SoupModel) -> None:
        # PeftModel's own would wrap every layer
        nn.Module.__init__(self)
        self.peft_type = "LORA"
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        object.__setattr__(self, "soup", soup)  # no module of its own: what it holds hangs under base_model
        self._tuner = _Tuner(soup)
        self.base_model = self._tuner

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that serve where no batch is mixed."""
        served = self.soup.served
        # A served profile keeps the object that its name has, so the identity tells it from equal weights.
        named = [name for name, weights in self.soup.profiles.items() if weights is served.weights]
        return named[:1] or served.experts

    @property
    def active_adapter(self) -> Any:  # type: ignore[override]
        """The one that serves, or a list where there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def forward(self, *arguments: Any, adapter_names: Sequence[str] | None = None, **keywords: Any) -> Any:
        """Run the model's forward; with `adapter_names` every row by its own adapter (`__base__`: by none)."""
        if adapter_names is None:
            return self.soup.model(*arguments, **keywords)
        with self.soup.mixture(_named(adapter_names)):
            return self.soup.model(*arguments, **keywords)

    def generate(self, *arguments: Any, adapter_names: Sequence[str] | None = None, **keywords: Any) -> Any:
        """Run the model's own generate; `adapter_names` as in forward, one for each prompt."""
        if adapter_names is None:
            return self.soup.model.generate(*arguments, **keywords)
        given: Any = arguments[0] if arguments else keywords.get("input_ids", keywords.get("inputs_embeds"))
        profiles = profile_per_prompt(list(given), _named(adapter_names))
        config = keywords.get("generation_config") or self.soup.model.generation_config
        with self.soup.mixture(profiles, rows_each=rows_per_prompt(keywords, config)):
            return self.soup.model.generate(*arguments, **keywords)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = True) -> None:
        """Serve an adapter, or the sum of several, from now on.

        Raises:
            UsageError: if one is unknown.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._adapters_disabled = False
        if len(names) == 1 and names[0] in self.soup.profiles:
            self.soup.served.set(names[0])
        else:
            self.soup.served.set_adapters(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the bare base within the block."""
        self._adapters_disabled = True
        try:
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
        """Let `adapter_name` stand for a weighted sum of experts: PEFT's `cat`, which is the sum of the deltas.

        Raises:
            UsageError: if another combination is asked for, the name is an expert's, or weights are missing.
        """
        if combination_type != "cat" or options:
            asked = ", ".join([combination_type, *options])
            raise UsageError(
                f"a mixture is the exact sum of the experts' deltas, not {asked}",
                where="combination_type",
                mend="take combination_type='cat', or merge with another method: psoups merge",
            )
        if len(adapters) != len(weights):
            raise UsageError(
                f"{len(weights)} weights for {len(adapters)} adapters",
                where="weights",
                mend="give one for each adapter",
            )
        table = dict(zip(adapters, map(float, weights), strict=True))
        self.soup.profiles.add(Profile(user=adapter_name, weights=table, allow_opposed=True))

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str, *_: Any, **__: Any
    ) -> None:
        """Hold one more expert under that name: a folder with a LoRA adapter. PEFT's further options say nothing here.

        Raises:
            SoupError: as `SoupModel.experts.add`.
        """
        self.soup.experts.add(model_id, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Let go of an expert, or forget a profile.

        Raises:
            UsageError: if nothing is called so.
        """
        if adapter_name in self.soup.profiles:
            if self.active_adapters == [adapter_name]:
                self.soup.served.set(None)
            self.soup.profiles.remove(adapter_name)
        else:
            self.soup.experts.remove(adapter_name)

    def get_base_model(self) -> Any:
        """Return the transformers model, its layers mixed."""
        return self.soup.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return 0 and the number of the base's parameters: nothing is trained here."""
        return 0, sum(parameter.numel() for parameter in self.soup.model.parameters())

    def add_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: an expert is trained elsewhere."""
        raise _not_here("a new adapter to train", "psoups train, or PEFT on the bare base, then load_adapter")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: the experts are files already."""
        raise _not_here("saving", "copy the experts' folders; a soup of them is written by psoups merge")

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: what is in memory serves everybody."""
        raise _not_here("merging in memory", "psoups merge writes a model, LiveAdapter holds one soup")


class _Tuner(nn.Module):
    """What stands between a PeftModel and its transformers model: `base_model.model`, `base_model.peft_config`."""

    def __init__(self, soup: SoupModel) -> None:
        super().__init__()
        object.__setattr__(self, "soup", soup)
        self.model = soup.model

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """Each expert's configuration, by its name."""
        found = {name: PeftConfig.from_pretrained(str(each.folder)) for name, each in self.soup.experts.items()}
        for config in found.values():
            config.inference_mode = True
        return found

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the model's forward."""
        return self.model(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _named(adapter_names: Sequence[str]) -> list[ProfileLike]:
    return [None if name == _BASE else name for name in adapter_names]


def _not_here(what: str, mend: str) -> UsageError:
    return UsageError(f"{what} is not what a mixed model does", where="PeftView", mend=mend)
