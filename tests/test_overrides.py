"""What is overridden exists in transformers, and can be called as transformers calls it.

A private method that is renamed there would silently never be called again: `_get_grad_norm` keeps NaN out of the
weights, `_save_rng_state` and `_init_training_state` make resuming exact.
"""

import inspect

import pytest
from transformers import Seq2SeqTrainer

from askd_hf import ASKDTrainer

OURS = [cls for cls in ASKDTrainer.__mro__ if cls.__module__.startswith("askd_hf.")]
# names of our own, none of which transformers has; all others must be there
OWN = {"_data_epoch", "_judge_labels", "_saving_errors", "collator_of_evaluation", "free_memory"}


def methods(cls: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(value) for name, value in vars(cls).items() if inspect.isfunction(value)}


OVERRIDES = [
    (cls, name) for cls in OURS for name in methods(cls) if name != "__init__" and hasattr(Seq2SeqTrainer, name)
]


def test_what_transformers_does_not_have_is_our_own():
    unknown = {name for cls in OURS for name in methods(cls) if not hasattr(Seq2SeqTrainer, name)}
    assert unknown <= OWN, "renamed in transformers, or to be added to OWN"
    assert not {name for name in OWN if hasattr(Seq2SeqTrainer, name)}, "transformers has a method of that name now"


@pytest.mark.parametrize(("cls", "name"), OVERRIDES, ids=lambda value: getattr(value, "__name__", value))
def test_an_override_takes_what_the_method_of_transformers_takes(cls, name):
    ours, theirs = methods(cls)[name], inspect.signature(getattr(Seq2SeqTrainer, name))
    kinds = {parameter.kind for parameter in ours.parameters.values()}
    takes_any_keyword, takes_any_position = (
        kind in kinds for kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    )
    positions = [p.name for p in ours.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    for place, parameter in enumerate(theirs.parameters.values()):
        if parameter.kind == parameter.VAR_KEYWORD:
            assert takes_any_keyword, f"**{parameter.name}"
        elif parameter.kind == parameter.VAR_POSITIONAL:
            assert takes_any_position, f"*{parameter.name}"
        else:
            assert parameter.name in ours.parameters or takes_any_keyword, parameter.name
            by_place = positions[place : place + 1] == [parameter.name]
            assert by_place or takes_any_position or parameter.name not in positions, f"{parameter.name} by its place"
    for parameter in ours.parameters.values():  # and asks for no more
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        assert optional or parameter.name in theirs.parameters, parameter.name
