"""Training: the loop, the stages of a run, and its folder."""
