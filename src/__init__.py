"""Train, compare and look at generative models: `python -m src.train model=vae`."""
