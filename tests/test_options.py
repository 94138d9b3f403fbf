"""The options: listed once, and shown wherever they are accepted."""

import inspect
from typing import get_type_hints

import pytest

from sg_kernels import SaliencyGraft, saliency_graft
from sg_kernels.options import DEFAULTS, TYPES, OptionTypes, options_of


def test_type_checkers_know_the_same_options():
    assert get_type_hints(OptionTypes) == TYPES
    assert list(get_type_hints(OptionTypes)) == list(TYPES)


@pytest.mark.parametrize("accepts", [saliency_graft, SaliencyGraft])
def test_the_signature_shows_every_option_with_its_default(accepts):
    parameters = inspect.signature(accepts).parameters
    for name, kind in TYPES.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == getattr(DEFAULTS, name)
        assert parameters[name].annotation == kind
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_help_shows_the_options_of_the_module():
    text = str(inspect.signature(SaliencyGraft))
    assert "temperature: float = 0.2" in text
    assert "prob: float = 1.0" in text


@pytest.mark.parametrize("accepts", [saliency_graft, SaliencyGraft])
def test_an_unknown_option_is_refused_by_name(accepts):
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'temprature'"):
        accepts(None, temprature=0.1)


def test_without_options_the_defaults_are_made_once():
    assert options_of("saliency_graft", {}) is DEFAULTS


@pytest.mark.parametrize("name", TYPES)
def test_every_option_is_described_in_the_docstring(name):
    documented = inspect.getdoc(saliency_graft).partition("Args:")[2]
    assert f"\n    {name}: " in documented
