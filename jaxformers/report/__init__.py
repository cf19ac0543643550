"""A run, or several side by side, as one HTML page that needs nothing beside itself. Reads what a run directory says of
its run; knows no model, array or checkpoint."""
