"""Documents to rows: the layout, the CM3 objective, packing and the input pipeline."""
