"""Functions that do not travel with a checkpoint: Nyström attention, landmarks, statistics of weights."""
