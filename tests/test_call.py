"""The one list of a call's arguments: the operators' schema follows from it."""

import pytest
import torch

from sg_kernels import ops
from sg_kernels.call import WRITTEN, Call, Outputs
from sg_kernels.pipeline import PASSED


@pytest.mark.operators
def test_the_schema_of_every_backend_is_the_call(backend):
    schema = ops.overload("saliency_graft", backend)._schema
    assert [argument.name for argument in schema.arguments] == list(Call._fields)
    assert [result.name for result in schema.returns] == list(Outputs._fields)


@pytest.mark.operators
def test_the_operator_writes_to_out_and_step_and_to_nothing_else(backend):
    schema = ops.overload("saliency_graft", backend)._schema
    written = {argument.name for argument in schema.arguments if argument.is_write}
    assert written == set(WRITTEN) == {"out", "step"}
    assert not any(result.alias_info for result in schema.returns)


def test_optional_tensors_are_those_with_none_as_their_default():
    optional = torch._C.OptionalType(torch._C.TensorType.get())
    arguments = ops.overload("saliency_graft", "reference")._schema.arguments
    found = {argument.name for argument in arguments if argument.type == optional}
    assert found == {
        name for name, default in Call._field_defaults.items() if default is None and name != "k"
    }


def test_options_that_the_operator_takes_as_they_are_are_passed_by_name():
    assert {"temperature", "k", "augmentations", "label_smoothing"} <= set(PASSED)


def test_options_that_the_operator_takes_otherwise_are_not():
    resolved = {"grid_size", "threshold", "normalize", "norm", "keep_prob", "num_classes"}
    assert not {*resolved, "no_fixed_points"} & set(PASSED)
