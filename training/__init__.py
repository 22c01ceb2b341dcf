"""Training: the loop, the stages of a run, its folder."""
