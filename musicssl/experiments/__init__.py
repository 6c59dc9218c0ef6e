"""One module per chapter: the arms of its grid and how one is run."""
