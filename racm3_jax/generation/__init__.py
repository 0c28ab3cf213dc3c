"""Drawing and captioning: the one decode loop and the tasks built on it."""
