"""The web demo of all tasks of a work directory (`racm3 demo`)."""
