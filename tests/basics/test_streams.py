import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.training.losses import derive_generator

names = st.tuples(st.text(max_size=3), st.lists(st.integers(0, 2**32), max_size=3)).map(
    lambda name: (name[0], *name[1])
)


@given(names, names)
def test_two_names_are_two_streams_and_a_name_is_one(a: tuple, b: tuple) -> None:
    for derive, draw in ((derive_rng, lambda rng: rng.random(4)), (derive_generator, draw_four)):
        assert np.array_equal(draw(derive(*a)), draw(derive(*b))) == (a == b)


def draw_four(generator: torch.Generator) -> np.ndarray:
    return torch.rand(4, generator=generator, dtype=torch.float64).numpy()


def test_numbers_that_end_in_zeros_are_other_streams() -> None:
    draws = [draw_four(derive_generator("planning", 7, *[0] * zeros))[0] for zeros in range(5)]
    draws += [derive_rng("planning", 7, *[0] * zeros).random() for zeros in range(5)]
    assert len(set(draws)) == 10


def test_a_stream_is_more_than_torch_makes_of_a_seed() -> None:
    """Of whose seeds 32 bits count: of 100,000 streams one or the other would be the same."""
    state = derive_generator("planning", 3).get_state()
    first_word = int(state[24:32].view(torch.int64))
    assert not torch.equal(torch.Generator().manual_seed(first_word).get_state()[24:], state[24:])


def test_a_stream_fills_the_whole_generator_as_numpys_twister_is_filled() -> None:
    generator = derive_generator("planning", 3)
    words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).numpy().astype(np.uint32)
    twister = np.random.RandomState()
    twister.set_state(("MT19937", words, 624))
    expected = twister.randint(0, 2**32, 1000, dtype=np.uint32) % 1000
    np.testing.assert_array_equal(torch.randint(1000, (1000,), generator=generator), expected)
