"""The checkpoints that end-to-end tests share."""

import pytest
from helpers.command_line import Workshop, make_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Converted and calibrated once, through the command line. Tests that damage files copy them first."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))
