"""Paths: the noise levels between the start and the end of each transition of a student.

A method of distillation says which levels a transition passes. All functions take the teacher's
grid and the student's, whose levels are some of the teacher's, and return levels (k + 1, M), from
t down to s, for M transitions. Column 0 is the transition with the least noise, column M - 1 the
one that starts at t = 1. A transition with fewer legs than others repeats its last level, which
has weight 0 in the target (diffusion/distillation.py).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.grids import Grid, positions

Paths = Float[Tensor, "_ _"]


def neighbours(teacher: Grid, student: Grid) -> Paths:
    """Every step of the student, through all levels of the teacher's grid on the way.

    Salimans & Ho 2022, algorithm 2, has two legs in each; any number is allowed, also different
    ones, and one alone, where the student makes the teacher's own steps.
    """
    at = positions(teacher, student)
    starts, ends = at[:-1], at[1:]
    legs = torch.arange(int((ends - starts).max()) + 1)[:, None]
    return teacher[torch.minimum(starts + legs, ends)].flip(1)


def segments(teacher: Grid, student: Grid) -> Paths:
    """Every step of the teacher, and from there straight to the end of the student's step.

    TRACT (Berthelot et al. 2023): t, the next level of the teacher's grid, the end of t's segment.
    """
    at = positions(teacher, student)
    starts = torch.arange(len(teacher) - 1)
    ends = at[torch.searchsorted(at, starts, right=True)]
    return torch.stack([teacher[starts], teacher[starts + 1], teacher[ends]]).flip(1)


def to_the_data(teacher: Grid, student: Grid) -> Paths:
    """Every step of the teacher, and from there straight to the data, whatever the student's grid.

    Consistency distillation (Song et al. 2023): TRACT with one segment.
    """
    positions(teacher, student)  # raises ValueError unless the student's levels are the teacher's
    return segments(teacher, teacher[[0, -1]])
