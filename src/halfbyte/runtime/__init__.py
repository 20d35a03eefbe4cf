"""Modules that run packed weights, and the way from a folder to a model that can answer."""
