"""Fixtures of all tests: no network, one thread, and a small random base model."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.optional import missing_package, missing_packages

# Before any test imports a library that reads them; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Model folders that are made from GGUF files must not be found in, or written to, the user's cache.
os.environ["PSOUPS_CACHE"] = tempfile.mkdtemp(prefix="psoups-tests-")
atexit.register(shutil.rmtree, os.environ["PSOUPS_CACHE"], ignore_errors=True)
# The tensors here are tiny: a second thread costs more in hand-over than it brings, and CI's cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job is started with Ctrl-C ignored, and hands that down: the tests that send one need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORDS = "wash the old kettle with warm water and soap then rub it dry with a clean towel so that it looks nice again"

Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)

_MISSING = pytest.StashKey[frozenset[str]]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--require-extras", action="store_true", help="fail where a package of an extra is missing")
    if not pluginmanager.has_plugin("timeout"):
        # --strict-config rejects options that nobody declares, and pyproject.toml sets this one
        parser.addini("timeout", "seconds for each test; without pytest-timeout nothing ends a test")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MISSING] = frozenset() if config.getoption("--require-extras") else missing_packages()
    if not config.pluginmanager.has_plugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ends a test; does nothing without pytest-timeout")
    if find_spec("hypothesis") is not None:
        from hypothesis import HealthCheck, settings

        # Hypothesis fails a slow example and slow generation: on a busy machine, both happen to sound code.
        settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("busy")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call = getattr(report, "call", None)  # pytest keeps the error here and a text of it in the report
    return _skipped(report, call and call.excinfo, collector)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _skipped(report, call.excinfo, item)


def _skipped(report: Report, error: Any, node: pytest.Item | pytest.Collector) -> Report:
    """Make a skip of a failure that a missing package of an extra caused; the reason names the package."""
    package = missing_package(error and error.value, node.config.stash[_MISSING]) if report.failed else None
    if package is not None:
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 0, f"Skipped: {package} is not installed")
    return report


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that would leave the machine; several processes of one test may talk on loopback."""
    connect = socket.socket.connect

    def refused(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6} and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise RuntimeError(f"a test tried to reach the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama (hidden 64, 2 layers, head_dim 32) with a byte-level BPE tokenizer.

    It is shared by the whole session: tests copy it before they change anything in it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small_base")
    tokenizer = _small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _small_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with a chat template, trained on one sentence: it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def umask_022() -> Iterator[None]:
    """Set the umask that makes new files 0644, regardless of the machine."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def psoups(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process and returns the exit code, stdout and stderr."""
    from personalized_soups.cli.app import build_app

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            build_app()([str(argument) for argument in arguments], prog_name="psoups")
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run
