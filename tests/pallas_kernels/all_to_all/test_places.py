"""Rows by expert, then by sender."""

import numpy as np

from pallas_kernels.all_to_all.places import first_places


def test_rows_lie_by_expert_then_by_sender():
    counts = np.array([[2, 0, 1, 3], [1, 4, 0, 2]], np.int32)
    # Chip 0: 2 + 1 rows for expert 0, then 0 + 4 for expert 1; chip 1: 1 + 0 for expert 2, then 3 + 2 for expert 3.
    np.testing.assert_array_equal(first_places(counts, 2), [[0, 3, 0, 1], [2, 3, 1, 4]])
