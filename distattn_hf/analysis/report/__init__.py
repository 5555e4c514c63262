"""One HTML page of an analysis: its sections and figures."""
