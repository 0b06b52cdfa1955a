"""Data sets by name, prepared once into plain files, and the batches that networks are trained and tested on."""
