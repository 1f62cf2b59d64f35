"""Training: the trainer, what it checks, the gate and its retention text, the three stages."""
