"""Optimisers, schedules, weight averages, gradient caching."""
