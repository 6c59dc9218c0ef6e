"""Where the music comes from."""
