"""The trained tables from which the soft tokens of each user are computed. arXiv 2402.05133, section 4.

Users are numbered from 1. Number 0 is the generic user. Users who are not in the tables get the generic user's tokens.

Shapes: U = known users, T = soft tokens of one user, K = clusters, H = width of the embeddings, N = rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from personalized_soups.declare.training import UserModelKind


def table_shapes(
    kind: UserModelKind, *, num_users: int, num_tokens: int, num_clusters: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each table of a kind of user model, by the table's name."""
    if kind == "cluster":
        return {"centers": (num_clusters, num_tokens, width), "logits": (num_users + 1, num_clusters)}
    generic: dict[str, tuple[int, ...]] = {"generic": (num_tokens, width)}
    return generic | ({"offsets": (num_users, num_tokens, width)} if kind == "individual" else {})


class UserTables(nn.Module):
    """Computes soft tokens from the tables of one kind of user model.

    - `individual`: e_u = e_0 + o_u, with the table `generic` (e_0) and the table `offsets` (o_1 to o_U).
    - `cluster`: e_u = sum over k of softmax(c_u)_k V_k, with the tables `centers` (V) and `logits` (c_0 to c_U).
    - `uninformative`: e_u = e_0, with the table `generic`.

    Args:
        kind: the kind of user model.
        tables: the tables by name, as `table_shapes` lists them. They become parameters, in float32.

    Attributes:
        kind: the kind of user model.
    """

    # The tables of one kind. The others do not exist.
    generic: nn.Parameter
    offsets: nn.Parameter
    centers: nn.Parameter
    logits: nn.Parameter

    def __init__(self, kind: UserModelKind, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kind = kind
        for name, table in tables.items():
            self.register_parameter(name, nn.Parameter(table.detach().to(torch.float32, copy=True)))

    @classmethod
    def drawn(
        cls,
        kind: UserModelKind,
        *,
        num_users: int,
        num_tokens: int,
        num_clusters: int,
        embed: Callable[[Tensor], Tensor],
        vocabulary: int,
        seed: int,
    ) -> Self:
        """Return tables with random initial values that depend only on the seed and the base.

        Each soft token starts as the embedding of a random token of the vocabulary. No token is drawn twice unless the
        vocabulary is too small. The logits of clusters are drawn from N(0, 1).

        Args:
            kind: the kind of user model.
            num_users, num_tokens, num_clusters: the sizes U, T and K.
            embed: a function that returns the embeddings [N, H] of token ids [N].
            vocabulary: the number of tokens that have an embedding.
            seed: the seed of the draws.
        """
        random = np.random.default_rng(seed)
        left: list[int] = []
        tables = {}
        width = int(embed(torch.zeros(1, dtype=torch.int64)).shape[-1])
        shapes = table_shapes(kind, num_users=num_users, num_tokens=num_tokens, num_clusters=num_clusters, width=width)
        for name, shape in shapes.items():
            if name == "logits":
                tables[name] = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
                continue
            count = int(np.prod(shape[:-1]))
            while len(left) < count:
                left += random.permutation(vocabulary).tolist()
            chosen, left = left[:count], left[count:]
            with torch.no_grad():
                tables[name] = embed(torch.tensor(chosen, dtype=torch.int64)).reshape(shape)
        return cls(kind, tables)

    def forward(self, users_N: Tensor) -> Tensor:
        """Return the soft tokens [N, T, H] of users, in float32. `users_N` holds int64 numbers; 0 is the generic user.

        The result of user 0 depends on no table of a known user.
        """
        if self.kind == "cluster":
            share_NK = torch.softmax(self.logits[users_N], dim=-1)
            return torch.einsum("nk,kth->nth", share_NK, self.centers)
        generic_NTH: Tensor = self.generic.expand(len(users_N), *self.generic.shape)
        if self.kind == "uninformative":
            return generic_NTH
        is_known_N = users_N > 0
        offsets_NTH = self.offsets[(users_N - 1).clamp(min=0)]
        return torch.where(is_known_N[:, None, None], generic_NTH + offsets_NTH, generic_NTH)
