"""One-shot differentiable search for multi-task dense prediction on the Coral Edge TPU."""
