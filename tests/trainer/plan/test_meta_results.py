"""Tests the memory of results' shapes: equal to torch's own results, and never in place of a view or a change."""

import pytest
import torch
from torch import Tensor

from halfbyte.trainer.plan import meta_results

aten = torch.ops.aten


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


CALLS = {
    "strides": (aten.mul.Tensor, lambda: (made(4, 6).t(), made(6, 1))),
    "promotion": (aten.add.Tensor, lambda: (made(3, dtype=torch.bfloat16), made(3))),
    "integer": (aten.mul.Scalar, lambda: (made(3, dtype=torch.int64), 2)),
    "float": (aten.mul.Scalar, lambda: (made(3, dtype=torch.int64), 2.0)),
    "bool": (aten.mul.Scalar, lambda: (made(3, dtype=torch.bool), True)),
    "several": (aten.native_layer_norm.default, lambda: (made(2, 5), [5], None, None, 1e-5)),
    "list": (aten.cat.default, lambda: ([made(2, 3), made(4, 3)],)),
    "made": (aten.zeros.default, lambda: ([2, 3],)),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_remembered_result_equals_the_computed_one(call: str) -> None:
    func, arguments = CALLS[call]
    options = {"device": torch.device("meta")} if call == "made" else {}
    expected = func(*arguments(), **options)
    for _ in range(3):
        found = meta_results.run(func, arguments(), options)
        assert type(found) is type(expected)
        pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
        for one, other in pairs:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
            assert one.device.type == "meta"


@pytest.mark.parametrize(
    ("func", "arguments"),
    [(aten.view.default, ([6],)), (aten._unsafe_view.default, ([6],)), (aten.add_.Scalar, (1,)), (aten.t.default, ())],
)  # fmt: skip
def test_a_result_that_shares_memory_is_never_made_up(func: object, arguments: tuple[object, ...]) -> None:
    for _ in range(3):
        given = made(2, 3)
        found = meta_results.run(func, (given, *arguments), {})
        assert found.untyped_storage()._cdata == given.untyped_storage()._cdata


def test_tensors_with_data_are_computed() -> None:
    for value in (1.0, 2.0):
        found = meta_results.run(aten.mul.Tensor, (torch.full((2,), value), torch.ones(2)), {})
        assert found.tolist() == [value, value]
