"""Learned gates: three estimators, one search around them."""
