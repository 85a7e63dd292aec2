"""Objectives: pure functions of tensors, and likelihoods as objects. All results are per example unless they say otherwise."""
