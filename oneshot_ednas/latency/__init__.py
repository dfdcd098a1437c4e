"""Latency of architectures: tables, the Edge TPU simulator, expectations under gates."""
