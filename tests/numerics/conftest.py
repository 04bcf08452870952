"""Tiny sharp models, built once, and one thread: the machine may be shared and sums must not depend on it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def opt() -> PreTrainedModel:
    return tiny.tiny_opt()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny.tiny_llama()


@pytest.fixture(params=["opt", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The model of the name in `request.param`; tests may choose it by indirect parametrization."""
    return request.getfixturevalue(request.param)
