"""Selection without order: the same latents as torch's, wherever they are selected."""

import pytest
import torch

from bridge.topk import FEWEST_ROWS, largest


@pytest.mark.parametrize("shape", [(FEWEST_ROWS - 1, 40), (FEWEST_ROWS, 40), (3, 5, 40), (0, 40)])
@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_values_and_indices_are_those_of_topk(shape, k, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(1000).floor().to(dtype)
    values, indices = largest(x, k)
    expected, _ = x.topk(k, dim=-1)
    torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=0, atol=0)
    torch.testing.assert_close(x.gather(-1, indices), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in indices.reshape(-1, k).tolist())


def test_what_is_not_a_number_is_selected_first_as_by_topk():
    x = torch.rand(FEWEST_ROWS, 40)
    x[:, 3] = torch.nan
    values, _ = largest(x, 2)
    assert values.isnan().sum(1).tolist() == [1] * FEWEST_ROWS


@pytest.mark.parametrize("rows", [1, FEWEST_ROWS])
def test_gradients_flow_to_what_is_selected(rows):
    x = torch.rand(rows, 40, requires_grad=True)
    values, indices = largest(x, 5)
    values.sum().backward()
    expected = torch.zeros(rows, 40).scatter(-1, indices, 1.0)
    torch.testing.assert_close(x.grad, expected)
