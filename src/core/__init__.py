"""The vocabulary every other room speaks: data specs, batches, capabilities, randomness. Imports torch only."""
