"""Winnow's library: over-parameterise, revive, compress, collapse, export and measure convolutional networks."""
