"""Functions that are not copied beside a checkpoint: Nyström attention, landmarks, statistics of weights."""
