"""Packages that import their public names on first use: askd_hf, askd_hf.evaluation, askd_hf.pseudo_labels."""

import ast
import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["askd_hf", "askd_hf.evaluation", "askd_hf.pseudo_labels"])
def test_type_checkers_and_python_see_the_same_names(name):
    package = importlib.import_module(name)
    (block,) = (node for node in ast.parse(Path(package.__file__).read_text()).body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == package._MODULES and len(typed) > 10
    for public, module in typed.items():
        assert getattr(package, public) is getattr(importlib.import_module(f"{name}.{module}"), public)


def test_a_name_that_does_not_exist():
    for name in ("askd_hf.evaluation", "askd_hf.pseudo_labels"):
        with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
            importlib.import_module(name).nothing  # noqa: B018
