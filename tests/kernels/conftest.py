from collections.abc import Callable
from types import ModuleType

import pytest

from kernels import attention, flash, st_rope


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """No test sees tables or a choice of backend that another has made."""
    for function in (st_rope._cached_tables, attention._resolve, flash.activate):
        function.cache_clear()


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str, str], list[str]]:
    """Note each call of a module's function as a word; all in one list. It runs as before."""
    heard: list[str] = []

    def begin(module: ModuleType, name: str, word: str) -> list[str]:
        function = getattr(module, name)

        def heard_of(*arguments, **options):
            heard.append(word)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, heard_of)
        return heard

    return begin
