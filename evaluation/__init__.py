"""How good are the samples: trajectories, and the report of a ladder."""
