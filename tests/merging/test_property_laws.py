"""Laws that hold for every soup: identity, linearity, order, negation, seeds, threads, shards.

`EXPLORE=10 .venv/bin/pytest tests/merging/test_property_laws.py` draws other examples, ten times as many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from personalized_soups.merging.writing.many import merge_many
from personalized_soups.methods.table import METHODS
from tests import oracles
from tests.experts import write_adapter
from tests.experts import write_expert as write_plain_expert
from tests.merging.formulas import soup_of
from tests.merging.worlds import (
    MODULES,
    WEIGHTS,
    WEIGHTS_FILE,
    Expert,
    Part,
    World,
    equal_worlds,
    examples,
    parts_of,
    read_model,
    worlds,
    write_base,
)
from tests.oracles import Matrix

pytestmark = pytest.mark.slow

U = 2.0**-24  # float32's half ulp, relative
RANDOM = [name for name, row in METHODS.items() if row.is_random]
FULL = max(min(shape) for shape in MODULES.values())
IDENTITY = {"density": 1.0, "epsilon": 0.0, "lambda": 1.0}


def keywords_of(method: str, **options: float) -> dict[str, Any]:
    """Return options for merge; dense methods get a rank that truncates nothing."""
    return {
        "method": method,
        "method_options": {name: value for name, value in options.items() if name in METHODS[method].options},
        **({"rank": FULL} if METHODS[method].family == "dense" else {}),
    }


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.name} {name}": raw
        for path in sorted(folder.glob("*.safetensors"))
        for name, (_, _, raw) in oracles.raw_tensors(path).items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Soups:
    """A world's experts on disk, and the soups merged from them, each in a new folder."""

    def __init__(self, root: Path, world: World) -> None:
        self.root, self.world, self.count = root, world, 0
        self.folders = world.write(root / "experts")
        self.library = ExpertLibrary.open(root / "experts")

    def merged(self, weights: Mapping[str, float] | None = None, **keywords: Any) -> Path:
        self.count += 1
        profile = self.world.profile() if weights is None else Profile(weights=dict(weights))
        return merge(self.library, profile, MergeOptions(**keywords)).write(self.root / f"out{self.count}")

    @property
    def weights(self) -> dict[str, float]:
        return dict(zip(self.world.names, self.world.weights, strict=True))


def sizes(parts: Sequence[Mapping[str, Part]], weights: Sequence[float]) -> dict[str, float]:
    """Return the norm of `sum |w s| |B| |A|` of each module, the unit of rounding errors."""
    found: dict[str, Matrix] = {}
    for each, weight in zip(parts, weights, strict=True):
        for module, part in each.items():
            size = abs(weight * part.scaling) * (np.abs(part.b) @ np.abs(part.a))
            found[module] = found.get(module, np.zeros_like(size)) + size
    return {module: float(np.linalg.norm(size)) for module, size in found.items()}


@pytest.mark.parametrize("method", METHODS)
@examples(6)
@given(world=worlds(dtypes=["F32"]))
def test_one_expert_of_weight_1_comes_back_by_every_method(method: str, world: World) -> None:
    """A and B are rounded at most twice each: 4 u s |B| |A|, and 1e-6 for the factors of a dense result."""
    one = World(world.experts[:1], (1.0,), world.seed)
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), one)
        parts = parts_of(soups.folders[0])
        keywords = keywords_of(method, **IDENTITY)
        adapter = oracles.deltas(soups.merged(**keywords))
        keywords.pop("rank", None)
        base = write_base(Path(name) / "base", "F32", world.seed)
        model = merge_into_base(soups.library, one.profile(), base, Path(name) / "model", MergeOptions(**keywords))
        before, after = read_model(base), read_model(model)
    room = sizes([parts], [1.0])
    assert adapter.keys() == parts.keys()
    for module, part in parts.items():
        bound = 1e-6 * float(np.linalg.norm(part.delta)) + 4 * U * room[module]
        assert np.linalg.norm(adapter[module] - part.delta) <= bound
        w = before[f"{module}.weight"]
        assert np.linalg.norm(after[f"{module}.weight"] - w - part.delta) <= bound + 4 * U * np.linalg.norm(w)


@examples(40)
@given(world=worlds(dtypes=["F32", "BF16"]), more=st.lists(WEIGHTS, min_size=4, max_size=4).filter(all))
def test_linear_is_linear(world: World, more: list[float]) -> None:
    """The soup of w + v is the soup of w plus the soup of v: three soups, each within u of its |w s| |B| |A|."""
    both = {name: w + v for name, w, v in zip(world.names, world.weights, more, strict=False)}
    others = dict(zip(world.names, more, strict=False))
    if not any(both.values()):
        return
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), world)
        one, two, sum_of_both = (
            oracles.deltas(soups.merged(w, dtype="float32")) for w in (soups.weights, others, both)
        )
        room = sizes([parts_of(each) for each in soups.folders], [abs(soups.weights[n]) + abs(others[n]) for n in both])
    for module in two:
        zero = np.zeros(MODULES[module])
        error = one.get(module, zero) + two[module] - sum_of_both.get(module, zero)
        assert np.linalg.norm(error) <= 3 * U * room[module]


@examples(40)
@given(world=worlds(dtypes=["F32"]), share=st.floats(-2, 3))
def test_a_weight_can_be_split_over_two_copies(world: World, share: float) -> None:
    """A copy has the same A, so its B is added to the expert's: again one rounding, u |w s| |B| |A| on each side."""
    weight = world.weights[0] or 0.5
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), world)
        write_copy(soups.folders[0], Path(name) / "experts" / "copy")
        soups.library = ExpertLibrary.open(Path(name) / "experts")
        whole = soups.merged({**soups.weights, "e0": weight})
        split = soups.merged({**soups.weights, "e0": weight * share, "copy": weight * (1 - share)})
        room = sizes([parts_of(each) for each in soups.folders], [4 * weight, *world.weights[1:]])
        one, other = oracles.deltas(whole), oracles.deltas(split)
    for module in one:
        error = np.linalg.norm(one[module] - other.get(module, np.zeros(MODULES[module])))
        assert error <= (2 * U + 2.0**-50) * room[module]


def write_copy(folder: Path, copy: Path) -> None:
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("method", METHODS)
@examples(5)
@given(world=equal_worlds(is_exact=False, least=2))
def test_order_and_experts_of_weight_zero_change_no_byte(method: str, world: World) -> None:
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), world)
        for extra in ("a_first", "z_last"):
            write_plain_expert(
                Path(name) / "experts" / extra, rank=world.experts[0].rank, alpha=world.experts[0].alpha, shapes=MODULES
            )
        soups.library = ExpertLibrary.open(Path(name) / "experts")
        keywords = keywords_of(method, density=0.5)
        want = bytes_of(soups.merged(**keywords))
        turned = dict(reversed(soups.weights.items()))
        assert bytes_of(soups.merged(turned, **keywords)) == want
        assert bytes_of(soups.merged({"a_first": 0.0, **turned, "z_last": 0.0}, **keywords)) == want


@pytest.mark.parametrize("method", METHODS)
@examples(5)
@given(world=equal_worlds(is_exact=False))
def test_negated_weights_negate_the_soup(method: str, world: World) -> None:
    """With mergekit's signed divisors the soup does not change: the divisor and the sum both change sign."""
    sign = 1 if method in {"ties@mergekit", "della@mergekit"} else -1
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), world)
        keywords = keywords_of(method, density=0.5)
        one = oracles.deltas(soups.merged(**keywords))
        other = oracles.deltas(soups.merged({n: -w for n, w in soups.weights.items()}, **keywords))
    for module, delta in one.items():
        # twice the rounding of two factors of rank at most FULL: 2 u sqrt(rank) of the norm
        bound = 4 * U * FULL**0.5 * np.linalg.norm(delta)
        assert np.linalg.norm(sign * delta - other[module]) <= bound
        assert bound < np.linalg.norm(delta) or not delta.any()


@examples(25)
@given(
    world=worlds(),
    others=st.lists(st.lists(WEIGHTS, min_size=4, max_size=4), min_size=1, max_size=4),
    cut=st.booleans(),
)
def test_a_row_of_merge_many_is_the_merge_of_one(world: World, others: list[list[float]], cut: bool) -> None:
    """Bytes are equal unless experts share A: then one float32 product gives the B's of all users.

    Its bound is `(E + 1) 2^-24 sum |w s B|`; B's below float32's normal numbers owe the smallest one too.
    """
    rows = [world.weights, *(tuple(row[: len(world.experts)]) for row in others)]
    profiles = [
        Profile(user=f"u{number}", weights=dict(zip(world.names, row, strict=True)))
        for number, row in enumerate(rows)
        if any(row)
    ]
    keywords: dict[str, Any] = {"dtype": "float32", **({"rank": 2} if cut else {})}
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), world)
        merge_many(soups.library, profiles, Path(name) / "many", MergeOptions(**keywords))
        parts = [parts_of(folder) for folder in soups.folders]
        for profile in profiles:
            alone = merge(soups.library, profile, MergeOptions(**keywords)).write(Path(name) / "alone" / profile.user)
            among = Path(name) / "many" / profile.user
            check_row(files_of(among), files_of(alone))
            if (one := bytes_of(among)) != bytes_of(alone):
                assert not cut or all(len({e.basis for e in world.experts}) < 4 for _ in one)
                got = oracles.factors(oracles.read_tensors(among / WEIGHTS_FILE))
                want = oracles.factors(oracles.read_tensors(alone / WEIGHTS_FILE))
                check_product(got, want, parts, list(profile.weights.values()))


@pytest.mark.parametrize("bases", [(0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_a_basis_that_some_of_them_share_is_no_basis_of_all(tmp_path: Path, bases: tuple[int, ...]) -> None:
    soups = Soups(tmp_path, World(tuple(Expert(2, 8, basis) for basis in bases), (0.5, -1.5, 0.75), 4))
    profiles = [Profile(user=f"u{n}", weights={"e0": 0.5, "e1": n + 0.25, "e2": -1.0}) for n in range(3)]
    merge_many(soups.library, profiles, tmp_path / "many")
    for profile in profiles:
        alone = merge(soups.library, profile).write(tmp_path / profile.user)
        assert files_of(tmp_path / "many" / profile.user) == files_of(alone)


def check_row(among: dict[str, bytes], alone: dict[str, bytes]) -> None:
    assert among.keys() == alone.keys()
    for name, content in among.items():
        assert content == alone[name] or name == WEIGHTS_FILE


def check_product(
    got: Mapping[str, tuple[Matrix, Matrix]],
    want: Mapping[str, tuple[Matrix, Matrix]],
    parts: Sequence[Mapping[str, Part]],
    weights: Sequence[float],
) -> None:
    assert got.keys() == want.keys()
    for module, (a, b) in got.items():
        own = [(each[module], w) for each, w in zip(parts, weights, strict=True) if w and module in each]
        np.testing.assert_array_equal(a, want[module][0])
        if len({part.a.tobytes() for part, _ in own}) > 1:
            np.testing.assert_array_equal(b, want[module][1])
            continue
        room = sum(abs(w * part.scaling) * np.abs(part.b) for part, w in own)
        assert isinstance(room, np.ndarray)
        rank = room.shape[1]
        # the merge of one owes u itself, and each of F64 a rounding when it is read
        bound = (len(own) + 3) * U * room + oracles.SMALLEST["F32"]
        assert (np.abs(b - want[module][1])[:, :rank] <= bound).all()
        assert not b[:, rank:].any()


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_decides_the_bytes(tmp_path: Path, method: str) -> None:
    soups = Soups(tmp_path, World(tuple(Expert(4, 8, index) for index in range(2)), (0.75, -0.5), 1))
    first = bytes_of(soups.merged(**keywords_of(method, seed=7)))
    assert bytes_of(soups.merged(**keywords_of(method, seed=7))) == first
    other = bytes_of(soups.merged(**keywords_of(method, seed=8)))
    assert other.keys() == first.keys()
    assert other != first


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear@mergekit"])
def test_what_an_expert_draws_depends_on_nothing_else_that_is_merged(tmp_path: Path, method: str) -> None:
    """The soup of both is the sum of the two, as for `linear`; truncation adds 1e-6 of the norms."""
    soups = Soups(tmp_path, World(tuple(Expert(4, 8, index) for index in range(2)), (0.75, -0.5), 1))
    keywords = keywords_of(method, density=0.5)
    both, one, two = (
        oracles.deltas(soups.merged(weights, **keywords)) for weights in (soups.weights, {"e0": 0.75}, {"e1": -0.5})
    )
    for module, delta in both.items():
        norms = float(np.linalg.norm(one[module]) + np.linalg.norm(two[module]))
        assert np.linalg.norm(delta - one[module] - two[module]) <= 1e-6 * norms


@pytest.mark.parametrize("method", RANDOM)
def test_each_expert_and_each_module_has_draws_of_its_own(tmp_path: Path, method: str) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 16)), random.normal(size=(12, 4))
    shapes = {f"model.layers.{layer}.mlp.up_proj": (12, 16) for layer in (0, 1)}
    tensors = {}
    for module in shapes:
        tensors[f"base_model.model.{module}.lora_A.weight"] = ("F32", a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = ("F32", b)
    for name in ("one", "copy"):
        write_adapter(tmp_path / "experts" / name, tensors, shapes=shapes)
    library = ExpertLibrary.open(tmp_path / "experts")
    keywords = {**keywords_of(method, density=0.5), **({"rank": 12} if METHODS[method].family == "dense" else {})}
    found = [
        delta
        for name in ("one", "copy")
        for delta in oracles.deltas(
            merge(library, Profile(weights={name: 1.0}), MergeOptions(**keywords)).write(tmp_path / name)
        ).values()
    ]
    for index, delta in enumerate(found):
        for other in found[:index]:
            # what two independent draws at density 1/2 have in common is far from all
            assert np.linalg.norm(delta - other) > 0.3 * np.linalg.norm(delta)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Large enough for several blocks of rows, for BLAS to share out, and for each of several threads to have a module.
LARGE = {
    "model.layers.0.self_attn.q_proj": (700, 300),
    "model.layers.0.mlp.up_proj": (96, 1500),
    "model.layers.1.self_attn.q_proj": (1100, 64),
    "model.layers.1.mlp.down_proj": (257, 513),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    for index, name in enumerate(("a", "b", "c")):
        write_plain_expert(root / "experts" / name, seed=index, rank=6, alpha=12, shapes=LARGE)
        write_plain_expert(root / "shared" / name, seed=index, rank=6, alpha=12, shapes=LARGE, a_seed=5)
    random = np.random.default_rng(0)
    (root / "base").mkdir()
    tensors = {f"{module}.weight": ("BF16", random.normal(size=shape)) for module, shape in LARGE.items()}
    oracles.write_tensors(root / "base" / "model.safetensors", tensors)
    (root / "base" / "config.json").write_text("{}")
    return root


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    "method", ["linear", "ties@paper", "dare_linear@mergekit", "della", "knots", "factor_ties", "factor_average"]
)
def test_the_number_of_threads_changes_no_byte(tmp_path: Path, large: Path, method: str) -> None:
    library = ExpertLibrary.open(large / "experts")
    profile = Profile(weights={"a": 0.7, "b": -0.4, "c": 1.1}, method=method)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = tmp_path / f"adapter{threads}"
        adapter = merge(library, profile, MergeOptions(rank=9)).write(out)
        model = merge_into_base(library, profile, large / "base", tmp_path / f"model{threads}")
        found.append((files_of(adapter), bytes_of(model)))
        assert torch.get_num_threads() == threads
    assert found[0] == found[1]
    assert found[0] == found[2]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("cut", [{"rank": 4}, {"energy": 0.8}, {"energy": 0.8, "target": "vllm"}])
def test_the_order_in_which_threads_are_done_changes_no_byte(tmp_path: Path, large: Path, cut: dict[str, Any]) -> None:
    """No file depends on it: soup.json sums the modules' errors, and adapter_config.json counts their ranks."""
    library = ExpertLibrary.open(large / "experts")
    profile = Profile(weights={"a": 0.7, "b": -0.4, "c": 1.1})
    found = []
    for run in range(12):
        torch.set_num_threads(1 + 3 * bool(run))
        found.append(files_of(merge(library, profile, MergeOptions(**cut)).write(tmp_path / str(run))))
    assert all(each == found[0] for each in found[1:])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("experts", ["experts", "shared"])
def test_the_number_of_threads_changes_no_byte_of_many(tmp_path: Path, large: Path, experts: str) -> None:
    library = ExpertLibrary.open(large / experts)
    profiles = [Profile(user=f"u{n}", weights={"a": 0.7 + n, "b": -0.4 * n - 0.1, "c": 1.1}) for n in range(3)]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        merge_many(library, profiles, tmp_path / str(threads))
        found.append(files_of(tmp_path / str(threads)))
    assert found[0] == found[1]
    assert found[0] == found[2]


@pytest.mark.parametrize("method", ["linear", "ties@paper", "dare_ties", "factor_average"])
@examples(5)
@given(world=equal_worlds(is_exact=False), dtype=st.sampled_from(["F32", "BF16"]))
def test_the_shard_layout_changes_no_tensor(method: str, world: World, dtype: str) -> None:
    found = []
    with tempfile.TemporaryDirectory() as name:
        soups = Soups(Path(name), world)
        for shards in (1, 2, 6):
            base = write_base(Path(name) / f"base{shards}", dtype, world.seed, shards=shards)
            out = merge_into_base(soups.library, world.profile(method=method), base, Path(name) / f"model{shards}")
            found.append({key.partition(" ")[2]: raw for key, raw in bytes_of(out).items()})
    assert found[0] == found[1]
    assert found[0] == found[2]


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_a_resumed_model_is_a_fresh_one_and_finished_shards_are_not_written_again(tmp_path: Path, method: str) -> None:
    """Interrupt at every call of `progress`, in the middle of shards and between them."""
    soups = Soups(tmp_path, World(tuple(Expert(2, 4, index) for index in range(3)), (0.7, -0.4, 1.3), 5))
    base = write_base(tmp_path / "base", "BF16", shards=4)
    profile = soups.world.profile(method=method)
    calls: list[int] = []
    fresh = merge_into_base(
        soups.library, profile, base, tmp_path / "fresh", progress=lambda *now: calls.append(now[0])
    )
    ends = np.cumsum(
        [sum(len(raw) for _, _, raw in oracles.raw_tensors(p).values()) for p in sorted(base.glob("*.safetensors"))]
    )
    num_kept = set()
    for number, done in enumerate(calls):
        root = tmp_path / str(number)
        seen: list[int] = []

        def stop(now: int, _total: int, seen: list[int] = seen, last: int = number) -> None:
            seen.append(now)
            if len(seen) > last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_into_base(soups.library, profile, base, root / "out", progress=stop)
        assert not (root / "out").exists()
        kept = {path.name: path.stat() for path in root.glob(".out.partial/new/*.safetensors")}
        # `progress` is called for a shard's last tensor before the shard is finished
        assert len(kept) == int((ends < done).sum())
        out = merge_into_base(soups.library, profile, base, root / "out")
        assert files_of(out) == files_of(fresh)
        assert [path.name for path in root.iterdir()] == ["out"]
        for name, before in kept.items():
            after = (out / name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        num_kept.add(len(kept))
    assert num_kept == {0, 1, 2, 3}


def test_another_soup_does_not_go_on_from_what_was_interrupted(tmp_path: Path) -> None:
    soups = Soups(tmp_path, World(tuple(Expert(2, 4, index) for index in range(2)), (0.7, -0.4), 5))
    base = write_base(tmp_path / "base", "F32", shards=3)
    total = sum(len(raw) for path in base.glob("*.safetensors") for _, _, raw in oracles.raw_tensors(path).values())

    def stop(done: int, _total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into_base(soups.library, soups.world.profile(), base, tmp_path / "out", progress=stop)
    assert list(tmp_path.glob(".out.partial/new/*.safetensors"))
    other = Profile(weights={"e0": 0.7, "e1": -0.5})
    out = merge_into_base(soups.library, other, base, tmp_path / "out")
    assert files_of(out) == files_of(merge_into_base(soups.library, other, base, tmp_path / "fresh"))
    parts = [parts_of(folder) for folder in soups.folders]
    want = soup_of("linear", parts, [0.7, -0.5], 1.0, 1.0)
    for module, delta in want.items():
        got = read_model(out)[f"{module}.weight"] - read_model(base)[f"{module}.weight"]
        assert oracles.relative_error(got, delta) < 1e-5
