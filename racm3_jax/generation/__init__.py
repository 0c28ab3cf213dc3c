"""Text to image, captioning and more: the one decode loop and the tasks built on it."""
