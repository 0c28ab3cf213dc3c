"""Input documents: readers, the document store, and images."""
