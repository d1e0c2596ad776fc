"""Evaluation of a trained model on downstream tasks."""
