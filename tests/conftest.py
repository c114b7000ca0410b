"""Fixtures that several folders of tests share: groups of real ranks and tiny random models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.ranks import RankGroups
from helpers.tiny_models import TinyModels


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The sums of small products do not depend on the machine's core count, and tests beside each other are quick."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankGroups]:
    """`ranks(3).run(case, **arguments)` runs a function of `helpers` on 3 real ranks."""
    groups = RankGroups()
    yield groups
    groups.close()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """`tiny_models("odd")` is the folder of a tiny random Llama, saved by transformers; `.hf("odd")` the model."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))
