import numpy as np
import pytest

from reports import score_confusion


def test_scores_of_a_confusion_matrix_written_out():
    scores = score_confusion(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert scores["accuracy"] == pytest.approx(9 / 12)
    np.testing.assert_allclose(scores["iou"], [6 / 9, 3 / 6, np.nan])
    np.testing.assert_allclose(scores["dice"], [12 / 15, 6 / 9, np.nan])
