import numpy as np
import pytest
import torch

from diffusion_policy.networks.labels import LabelRows

RNG = np.random.default_rng(0)


def fitted(embeddings: np.ndarray) -> LabelRows:
    rows = LabelRows(*embeddings.shape)
    rows.fit(embeddings.astype(np.float32))
    return rows


def test_a_label_without_embedding_is_a_one_hot_row_and_an_open_one_is_zeros() -> None:
    rows = LabelRows(3)
    assert rows.numbers == 3
    assert rows(torch.tensor([2, -1])).tolist() == [[False, False, True], [False, False, False]]
    assert not rows.state_dict()


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("count, size", [(2, 300), (4, 7), (9, 3)])
def test_rows_are_of_about_one_and_as_far_apart_as_the_embeddings(count: int, size: int, scale: float) -> None:
    embeddings = (5 + RNG.normal(size=(count, size))) * scale
    rows = fitted(embeddings)
    found = rows(torch.arange(count)).double()
    assert rows.numbers == found.shape[1] == min(count - 1, size)
    assert float(found.square().mean()) == pytest.approx(1, rel=1e-3)
    assert found.mean(dim=0).abs().max() < 1e-3
    ratios = torch.pdist(found) / torch.pdist(torch.from_numpy(embeddings))
    torch.testing.assert_close(ratios / ratios.mean(), torch.ones_like(ratios), atol=1e-3, rtol=0)
    assert not rows(torch.tensor([-1])).any()


def test_a_new_label_lies_where_its_embedding_does_whatever_else_that_says() -> None:
    embeddings = RNG.normal(size=(3, 50))
    rows = fitted(embeddings)
    beside = RNG.normal(size=50)
    known = embeddings - embeddings.mean(axis=0)
    beside -= np.linalg.pinv(known) @ known @ beside  # nothing of what the known ones differ in
    more = rows.with_label(0.5 * embeddings[0] + 0.5 * embeddings[1] + beside)
    assert len(rows(torch.arange(3))) == 3  # as it was
    found = more(torch.arange(4))
    torch.testing.assert_close(found[3], (found[0] + found[1]) / 2, atol=1e-4, rtol=0)
    assert torch.equal(found[:3], rows(torch.arange(3)))


def test_directions_in_which_known_labels_do_not_differ_say_nothing() -> None:
    first, second = RNG.normal(size=(2, 20))
    embeddings = np.stack([a * first + b * second for a in (0, 1) for b in (0, 1)])  # four in a plane
    rows = fitted(embeddings)
    assert rows.numbers == 3
    assert not rows.with_label(RNG.normal(size=20))(torch.tensor([4]))[0, 2:].any()


def test_embeddings_of_another_size_and_those_that_tell_nothing_apart_are_refused() -> None:
    rows = fitted(RNG.normal(size=(3, 5)))
    with pytest.raises(ValueError, match=r"embeddings of 5 numbers; got shape \(4,\)"):
        rows.with_label(np.ones(4))
    with pytest.raises(ValueError, match="two instructions have the same embedding"):
        fitted(np.ones((2, 5)))
