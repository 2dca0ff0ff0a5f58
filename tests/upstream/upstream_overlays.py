"""A pytest plugin: every causal LM of hasten's families that a test makes or loads gets hasten's overlays."""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from hasten.families import FAMILIES
from hasten.patching import apply

LOADING: ContextVar[bool] = ContextVar("LOADING", default=False)
"""Whether `from_pretrained` is running: it constructs a model first and reads the weights into it afterwards."""


class Overlays:
    """Wraps construction and loading of a causal LM's class, and counts the models that get overlays."""

    def __init__(self) -> None:
        self.models = 0

    def wrap(self, kind: Any) -> None:
        """Wraps `kind.__init__` and `kind.from_pretrained`."""
        kind.__init__ = self._constructing(kind.__init__, kind)
        kind.from_pretrained = classmethod(self._loading(kind.from_pretrained.__func__, kind))

    def _apply(self, model: Any) -> None:
        apply(model)
        self.models += 1

    def _constructing(self, init: Callable[..., None], kind: type) -> Callable[..., None]:
        @functools.wraps(init)
        def init_and_apply(model: Any, *args: Any, **kwargs: Any) -> None:
            init(model, *args, **kwargs)
            if type(model) is kind and not LOADING.get():
                self._apply(model)

        return init_and_apply

    def _loading(self, load: Callable[..., Any], kind: type) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_and_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            token = LOADING.set(True)
            try:
                found = load(cls, *args, **kwargs)
            finally:
                LOADING.reset(token)
            for model in found if isinstance(found, tuple) else (found,):
                if type(model) is kind:
                    self._apply(model)
            return found

        return load_and_apply

    @pytest.fixture(scope="session", autouse=True)
    def count_models(self, record_testsuite_property: Callable[[str, Any], None]) -> Iterator[None]:
        """Writes the number of models with overlays into the record of the run."""
        yield
        record_testsuite_property("models", self.models)


def pytest_configure(config: pytest.Config) -> None:
    """Wraps the classes of the families' causal LMs."""
    overlays = Overlays()
    config.pluginmanager.register(overlays)
    for family in FAMILIES.values():
        overlays.wrap(getattr(importlib.import_module(family.classes.module), family.classes.causal_lm))
