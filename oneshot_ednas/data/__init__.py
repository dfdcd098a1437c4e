"""Frames in, training batches out: data sets, their packed cache and the augmentation."""
