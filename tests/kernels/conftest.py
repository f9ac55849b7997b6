import pytest

from kernels import attention, flash, st_rope


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """No test sees tables or a choice of backend that another has made."""
    for function in (st_rope._cached_tables, attention._resolve, flash.activate):
        function.cache_clear()
