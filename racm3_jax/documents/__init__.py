"""Documents from outside: readers, the document store, images, and flagworld."""
