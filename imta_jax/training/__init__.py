"""Training: the loop, its phases and steps, and what it writes to a workdir."""
