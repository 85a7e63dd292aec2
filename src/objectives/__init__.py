"""Objectives: pure functions of tensors, and likelihoods as objects. Results are per example, `(B,)`."""
