"""Inference that stops early: costs of exits, exit rules, thresholds, and the engine."""
