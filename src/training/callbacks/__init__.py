"""Callbacks: progress, checkpoints, pictures, the dashboard page. They ask a model for capabilities, never for its class."""
