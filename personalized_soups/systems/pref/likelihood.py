"""The joint maximum likelihood of users and base rewards.

Shapes: U = users, M = items, F = features of an item, J = base rewards, N = comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.systems.pref.start import Start
from personalized_soups.systems.preference_models import Comparisons

# L-BFGS stops when no gradient or no step is larger.
_GRADIENT_TOLERANCE = 1e-6
_STEP_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True, eq=False)
class JointLikelihood:
    """The penalised negative log likelihood of users' weights and base rewards, in float64 on one device.

    With the margin `m = users[u] . (x_a - x_b) vectors` of a comparison with the label y, it is

        sum(-y log sigmoid(m) - (1 - y) log sigmoid(-m)) + users_penalty / 2 |users|^2 + vectors_penalty / 2 |vectors|^2

    Attributes:
        features: [M, F], float64. The penalty of `vectors` assumes that differences of features have the variance 1.
        a, b, users: [N], int64, as in `Comparisons`.
        labels: [N], float64.
        users_penalty: at least 0.
        vectors_penalty: at least 0.
        fixed_first: each user's first weight is fixed at 1. It is not penalised.
    """

    features: Tensor
    a: Tensor
    b: Tensor
    users: Tensor
    labels: Tensor
    users_penalty: float
    vectors_penalty: float
    fixed_first: bool = False

    @classmethod
    def of(
        cls,
        comparisons: Comparisons,
        *,
        users_penalty: float,
        vectors_penalty: float,
        fixed_first: bool = False,
        device: torch.device | str = "cpu",
    ) -> JointLikelihood:
        """Return the likelihood of some comparisons, with copies of their arrays on the device."""
        return cls(
            torch.tensor(comparisons.features, device=device),
            torch.tensor(comparisons.a, device=device),
            torch.tensor(comparisons.b, device=device),
            torch.tensor(comparisons.users, device=device),
            torch.tensor(comparisons.labels, device=device),
            users_penalty,
            vectors_penalty,
            fixed_first,
        )

    def __call__(self, users_UJ: Tensor, vectors_FJ: Tensor) -> Tensor:
        """Return the value, a float64 tensor without dimensions. It is differentiable in both arguments."""
        base_MJ = self.features @ vectors_FJ
        margins_N = ((base_MJ[self.a] - base_MJ[self.b]) * users_UJ[self.users]).sum(dim=1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(margins_N, self.labels, reduction="sum")
        penalised_UJ = users_UJ[:, 1:] if self.fixed_first else users_UJ
        return (
            loss
            + self.users_penalty / 2 * penalised_UJ.square().sum()
            + self.vectors_penalty / 2 * vectors_FJ.square().sum()
        )

    def maximise(self, start: Start, *, max_steps: int) -> tuple[Start, list[float]]:
        """Return the most likely users and vectors, and the value after each evaluation, the first at the start.

        The optimiser is L-BFGS with the strong Wolfe conditions over all comparisons, so the result is deterministic on
        one machine.
        """
        device = self.features.device
        users = torch.tensor(start.users, device=device)
        free_U = users[:, 1:].clone() if self.fixed_first else users
        vectors = torch.tensor(start.vectors, device=device)
        free = [free_U.requires_grad_(), vectors.requires_grad_()]
        optimiser = torch.optim.LBFGS(
            free,
            max_iter=max_steps,
            max_eval=2 * max_steps,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=_GRADIENT_TOLERANCE,
            tolerance_change=_STEP_TOLERANCE,
        )
        values: list[float] = []

        def whole() -> Tensor:
            return torch.cat([torch.ones_like(free_U[:, :1]), free_U], dim=1) if self.fixed_first else free_U

        def closure() -> float:
            optimiser.zero_grad()
            loss = self(whole(), vectors)
            loss.backward()
            values.append(float(loss.detach()))
            return values[-1]

        optimiser.step(closure)
        return Start(whole().detach().cpu().numpy(), vectors.detach().cpu().numpy()), values
