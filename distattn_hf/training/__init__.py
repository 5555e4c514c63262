"""Training: arguments, objectives, the Trainer subclass, adaptation and training from scratch."""
