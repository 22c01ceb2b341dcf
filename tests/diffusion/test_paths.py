import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.grids import uniform_grid
from diffusion.paths import neighbours, segments, to_the_data
from tests.toys import COSINE


@pytest.mark.parametrize("num_steps", [1, 2, 5, 64])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_neighbours_are_the_students_steps_and_the_teachers_between(num_steps, k):
    student, teacher = uniform_grid(COSINE, num_steps), uniform_grid(COSINE, k * num_steps)
    levels = neighbours(teacher, student)
    assert levels.shape == (k + 1, num_steps)
    torch.testing.assert_close(levels[0], student[:-1].flip(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(levels[-1], student[1:].flip(0), rtol=1e-12, atol=1e-12)
    for step in range(num_steps):
        start = k * (num_steps - 1 - step)
        assert torch.equal(levels[:, step], teacher[start : start + k + 1])
    t = torch.arange(1, num_steps + 1).double() / num_steps  # the paper's t = (i + 1) / N
    torch.testing.assert_close(levels[0], COSINE(t), rtol=1e-12, atol=1e-12)


@st.composite
def grids(draw):
    """A teacher's grid, and a student's grid that is any part of it."""
    teacher = uniform_grid(COSINE, draw(st.integers(1, 40)))
    inner = draw(st.sets(st.integers(1, len(teacher) - 1)))
    return teacher, teacher[sorted({0, len(teacher) - 1} | inner)]


@given(grids())
def test_uneven_steps_are_padded_with_their_last_level(pair):
    teacher, student = pair
    levels = neighbours(teacher, student)
    walked = [column.unique_consecutive() for column in levels.flip(1).T]
    for column, start, end in zip(walked, student, student[1:], strict=False):
        assert column[0] == start
        assert column[-1] == end
    joined = torch.cat([walked[0], *(column[1:] for column in walked[1:])])
    assert torch.equal(joined, teacher), "the walks together are the teacher's grid"


@given(grids())
def test_segments_tile_the_grid(pair):
    teacher, student = pair
    t, following, end = segments(teacher, student).flip(1)
    assert torch.equal(t, teacher[:-1])
    assert torch.equal(following, teacher[1:])
    assert torch.equal(end.unique_consecutive(), student[1:])
    assert (end >= following).all()
    for level, ends in zip(t, end, strict=True):  # the first of the student's levels below t
        assert ends == student[student > level].min()


@given(grids())
def test_consistency_is_tract_with_one_segment(pair):
    teacher, student = pair
    levels = to_the_data(teacher, student)
    assert torch.equal(levels, segments(teacher, teacher[[0, -1]]))
    assert (levels[2] == torch.inf).all()
