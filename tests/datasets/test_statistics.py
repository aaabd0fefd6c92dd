from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion_policy.datasets.statistics import Measuring, measure
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.summary import summarize


@given(
    arrays(np.float32, st.tuples(st.integers(1, 50), st.integers(1, 3)), elements=st.floats(-1e6, 1e6, width=32)),
    st.lists(st.integers(0, 50), max_size=4),
)
def test_blocks_of_any_size_give_what_all_rows_give(rows: np.ndarray, cuts: list[int]) -> None:
    measuring = Measuring()
    for block in np.split(rows, sorted(min(cut, len(rows)) for cut in cuts)):
        measuring.add(block)
    found = measuring.result()
    exact = rows.astype(np.float64)
    assert found.rows == len(rows)
    np.testing.assert_array_equal(found.minimum, exact.min(0))
    np.testing.assert_array_equal(found.maximum, exact.max(0))
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(found.std, exact.std(0), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.low, np.quantile(exact, 0.01, axis=0))
    np.testing.assert_allclose(found.high, np.quantile(exact, 0.99, axis=0))


def test_moments_far_from_zero_keep_their_digits() -> None:
    rows = 1e8 + np.random.default_rng(0).normal(size=(100_000, 1))
    assert measure(rows).std[0] == pytest.approx(rows.std(), rel=1e-6)


def test_quantiles_of_many_rows_come_from_a_uniform_sample() -> None:
    measuring = Measuring()
    rng = np.random.default_rng(0)
    for start in np.linspace(0, 1, 400, endpoint=False):  # the first and the last rows are unlike
        measuring.add(start + rng.random((1000, 1)) / 400)
    found = measuring.result()
    assert len(measuring.sample) == 2**16
    assert found.low[0] == pytest.approx(0.01, abs=0.002)
    assert found.high[0] == pytest.approx(0.99, abs=0.002)


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Measuring().result()


def test_one_pass_over_a_store_gives_its_fingerprint_and_the_statistics_of_some_episodes(demonstrations: Path) -> None:
    store = EpisodeStore.open(demonstrations)
    chosen = [0, 3, 4]
    summary = summarize(store, ["actual_xy"], "action", chosen)
    assert summary.fingerprint == store.fingerprint(["actual_xy"])
    rows = np.concatenate([episode.data["actual_xy"] for episode in store.episodes(chosen)])
    for found, expected in zip(summary.statistics["actual_xy"], measure(rows), strict=True):
        if isinstance(expected, np.dtype | None):
            assert found == expected
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-12)
