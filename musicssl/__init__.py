"""Five papers on learning music representations without labels, as one library."""
__version__ = "0.1.0"
