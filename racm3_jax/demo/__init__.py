"""A page in the browser for everything a work directory can do (`racm3 demo`)."""
