"""Data sets, one file each. Every data set is prepared once into memory-mapped arrays; batches are gathered by index."""
