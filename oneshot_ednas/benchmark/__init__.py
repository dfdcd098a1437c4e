"""Tabular benchmarks: stand-alone trainings of stratified architectures, kept to be looked up."""
