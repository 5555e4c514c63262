"""Training: arguments, data, objectives, the Trainer subclass and the Accelerate loop."""
