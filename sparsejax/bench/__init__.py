"""Measurements that end as rows in ``results/``, never as assertions in a test."""
