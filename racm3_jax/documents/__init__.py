"""Input documents: readers, the document store, images, and flagworld."""
