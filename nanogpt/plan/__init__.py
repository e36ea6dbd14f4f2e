"""Know before you run: predicted memory and speed, isolated trials, sweeps and their report."""
