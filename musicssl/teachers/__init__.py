"""Teachers: codes in place of labels, one for every moment of a clip."""
