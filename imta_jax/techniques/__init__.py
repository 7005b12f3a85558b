"""Training techniques for networks with several exits; each file works with any Flax model."""
