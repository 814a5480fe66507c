"""The part of `psoups doctor` that measures preference pairs: what the experts of a soup do to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.training.interference import Interference


@dataclass(frozen=True, slots=True)
class PairsRequest:
    """A request to measure preference pairs.

    Attributes:
        files: for each side, its file of pairs.
        num_pairs: the number of pairs of each file.
        base: the value of --base.
        on: the adapter below the experts, or None.
        device: `auto`, `cpu` or `cuda`.
    """

    files: Mapping[str, Path]
    num_pairs: int
    base: str
    on: Path | None
    device: str

    @classmethod
    def of(
        cls, pairs: list[str] | None, base: str | None, *, num_pairs: int, on: Path | None, device: str
    ) -> PairsRequest | None:
        """Return the request, or None if no pairs are given.

        Raises:
            UsageError: if a value of --pairs is not SIDE=FILE, a side is given twice, there is no base, or only --on
                is given.
        """
        if not pairs:
            if on is not None:
                raise UsageError(
                    "--on is only for pairs, but --pairs is not given",
                    where="--on",
                    mend="give --pairs SIDE=FILE as well, or remove --on",
                )
            return None
        files: dict[str, Path] = {}
        for value in pairs:
            side, equals, path = value.partition("=")
            if not (side and equals and path) or side in files:
                raise UsageError(
                    f"the value is {value!r}, but must be SIDE=FILE, with each side once",
                    where="--pairs",
                    mend="give e.g. --pairs concise=concise.jsonl --pairs friendly=friendly.jsonl",
                )
            files[side] = Path(path)
        if base is None:
            raise UsageError(
                "pairs are measured with the base model, but --base is not given",
                where="--base",
                mend="give --base with the model that the experts were trained on",
            )
        return cls(files, num_pairs, base, on, device)

    def measure(self, experts: list[Path], *, same_base: bool, quiet: bool) -> Interference:
        """Load the base with the experts, and measure the pairs under the base and under each expert alone."""
        from personalized_soups.mixing.model import SoupModel
        from personalized_soups.training.interference import Interference

        model = SoupModel.from_pretrained(
            resolve_base(self.base), experts, on=self.on, device=self.device, same_base=same_base
        )
        with render.progress("measuring pairs", quiet=quiet) as bar:
            return Interference.measure(
                model,
                self.files,
                num_pairs=self.num_pairs,
                on_done=lambda done, total: bar.update(done, total=total),
            )


def weights_of(profile: Profile | None, interference: Interference) -> dict[str, float]:
    """Return the weights of the profile, or 1 for each side with pairs if there is no profile."""
    return dict.fromkeys(interference.forecasts, 1.0) if profile is None else dict(profile.resolved_weights())


def show_interference(interference: Interference, weights: Mapping[str, float]) -> None:
    """Print what each expert does to the pairs of each side, and what the soup is expected to do."""
    forecasts = interference.soup(weights)
    names = [name for name, weight in weights.items() if weight]
    rows: list[list[render.Cell]] = [
        [forecast.side, forecast.num_pairs, forecast.alone, forecast.soup, *(forecast.changes[name] for name in names)]
        for forecast in forecasts
    ]
    render.show_table(
        ["pairs for", "pairs", "alone", "soup (forecast)", *(f"by {name}" for name in names)],
        rows,
        title="Share of pairs moved towards the chosen answer, and the mean change of the margin by each expert (nats)",
    )


def interference_json(interference: Interference, weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the forecasts of all sides for --json."""
    return [
        {
            "side": forecast.side,
            "num_pairs": forecast.num_pairs,
            "alone": forecast.alone,
            "soup": forecast.soup,
            "changes": forecast.changes,
            "is_harmed": forecast.is_harmed,
        }
        for forecast in interference.soup(weights)
    ]
