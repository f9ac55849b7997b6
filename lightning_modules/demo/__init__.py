"""The demo: its world, its run, its probe of what was learnt, its report."""
