"""Rows of length 1 keep fp32 where autocast would round them."""

import pytest
import torch

from sslmed.models.unit_length import unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_have_length_1_in_fp32_or_better(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = unit(rows)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    torch.testing.assert_close(found, rows.to(wide) / rows.to(wide).norm(dim=2, keepdim=True))


def test_a_row_of_zeros_stays_finite() -> None:
    assert torch.equal(unit(torch.zeros(1, 3)), torch.zeros(1, 3))
