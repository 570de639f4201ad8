"""Measurements of a network: spikes, synaptic operations, energy, binarity."""
