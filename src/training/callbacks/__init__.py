"""Callbacks: progress, checkpoints, pictures, the dashboard page. They ask for capabilities, never for a class."""
