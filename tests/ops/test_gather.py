"""Rows laid out and taken back have the values and gradients of plain indexing."""

import torch

from mor.ops.gather import lay_out, take_back


def test_rows_there_and_back_are_those_of_indexing() -> None:
    """Places that only fill up count for nothing."""
    torch.manual_seed(0)
    row_P = torch.tensor([2, 0, 0, 0, 3, 1, 1])
    place_N = torch.tensor([1, 5, 0, 4])
    found = []
    for is_plain in (False, True):
        torch.manual_seed(1)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        laid = x[row_P] if is_plain else lay_out(x, row_P, place_N)
        done = laid.sin() * torch.arange(7.0)[:, None]
        back = done[place_N] if is_plain else take_back(done, place_N)
        (back * torch.arange(12.0).reshape(4, 3)).sum().backward()
        found.append((laid, back, x.grad))
    for fast, plain in zip(*found, strict=True):
        assert fast is not None
        assert plain is not None
        torch.testing.assert_close(fast, plain, rtol=0, atol=0)
