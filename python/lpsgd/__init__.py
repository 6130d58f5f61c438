"""LPSGD."""
