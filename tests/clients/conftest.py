"""Where the clients live, what they are given to read, and where the figures go."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client_models import MODELS, Subject, quantized, subject

ROOT = Path(__file__).parents[2]
MAKE_ENVIRONMENT = ROOT / "benchmarks/peers/make_environment.sh"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clients")
    group.addoption("--peers-dir", type=Path, help="environments of peers, made when missing (default: pytest's cache)")
    group.addoption("--reference-dir", type=Path, help="models/ and data/wiki/ to test with (default: ../shared)")
    group.addoption("--record", type=Path, help="JSON file to write the figures to")


def option(request: pytest.FixtureRequest, name: str) -> Any:
    """None in a run over all tests too, where pytest meets this file too late to know its options."""
    return request.config.getoption(name, default=None)


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of an environment with vLLM in it, which is made if need be."""
    folder = (option(request, "--peers-dir") or request.config.cache.mkdir("peers")) / "vllm"
    if not folder.exists():
        try:
            subprocess.run([MAKE_ENVIRONMENT, "vllm", folder], check=True, env=os.environ | {"PYTHON": sys.executable})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # the next run would take half an environment for a whole one
            raise
    return folder / "bin/python"


@pytest.fixture(scope="session")
def subject_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """A model of MODELS with its texts by name; skips the test where this machine does not have it."""
    reference = option(request, "--reference-dir") or ROOT.parent / "shared"
    texts = tmp_path_factory.mktemp("texts")

    def find(name: str) -> Subject:
        found = subject(name, reference, texts)
        if not found.folder.is_dir():
            pytest.skip(f"{found.folder} is not here: --reference-dir says where models/{name} is")
        return found

    return find


@pytest.fixture(scope="session")
def checkpoint_of(
    subject_of: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A model of MODELS, quantized once, in any layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda name, layout: quantized(subject_of(name), layout, folder)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """What the tests measure; --record keeps it."""
    measured: list[dict[str, Any]] = []
    yield measured
    if path := option(request, "--record"):
        order = list(MODELS)
        measured.sort(key=lambda row: (row["client"], order.index(row["model"])))
        path.write_text(json.dumps({"rows": measured}, indent=1) + "\n", encoding="utf-8")
