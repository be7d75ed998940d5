"""Tells transformers' auto classes of mor, whichever of the two is imported first.

`import mor` must not wait for transformers, so this waits for the module that holds `AutoConfig`:
it registers our config as soon as that one is there. The config brings the model when it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Register now, or as soon as transformers' auto classes are imported."""
    if AUTO_CONFIG in sys.modules:
        _register(sys.modules[AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AutoConfigFinder())


class _AutoConfigFinder:
    """Finds one module, as the other finders would, and registers mor once it has been run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO_CONFIG:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run_module(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec


def _register(auto: ModuleType) -> None:
    version = sys.modules["transformers"].__version__
    if version.split(".")[0] != "5":
        from mor.log import logger

        logger.warning("mor works with transformers 5; its auto classes of %s miss mor", version)
        return
    from mor.hf_config import MorConfig

    auto.AutoConfig.register(MorConfig.model_type, MorConfig, exist_ok=True)
