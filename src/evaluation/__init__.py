"""Evaluation: a model, its data and a list of metrics to results, under one protocol for all models."""
