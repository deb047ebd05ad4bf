"""What the tests of sweeps share: two cores, whatever machine this is."""

import pytest

from pisa_fl.engines.base import SHARE


@pytest.fixture(autouse=True, scope="package")
def two_cores():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARE, "2")
        yield
