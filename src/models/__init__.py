"""Models, one file per family. `__init__` wires the parts, the rest is losses, samples and the capabilities it has."""
