"""One trainer for the generator, CLIP and the VQGAN: loss, optimizer, step, loop."""
