"""Inner products of rows."""

import numpy as np
import pytest

from deltaworks.merging.products import inner_products


@pytest.mark.parametrize(
    "shape", [(1, 16), (2, 128), (3, 1024), (4, 1040), (5, 2048), (9, 4112), (112, 128), (3, 1, 128), (2, 3, 7, 256)]
)
def test_every_row_is_multiplied_with_every_other(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
    wide = rows.astype(np.float64)
    products = inner_products(rows)
    np.testing.assert_allclose(products, wide @ wide.swapaxes(-1, -2), rtol=1e-5, atol=2e-4)
    np.testing.assert_array_equal(products, products.swapaxes(-1, -2))


def test_products_hang_on_no_other_row() -> None:
    rows = np.random.default_rng(1).standard_normal((3, 11, 128)).astype(np.float32)
    products = inner_products(rows)
    for matrix, own in zip(rows, products, strict=True):
        for count in range(1, 11):
            np.testing.assert_array_equal(inner_products(matrix[:count]), own[:count, :count])


def test_rows_need_not_be_contiguous() -> None:
    rows = np.random.default_rng(2).standard_normal((6, 4, 128)).astype(np.float32)
    np.testing.assert_array_equal(inner_products(rows.swapaxes(0, 1)), inner_products(rows.swapaxes(0, 1).copy()))
