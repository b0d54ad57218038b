"""What a backbone is worth: frozen probes, metrics, and the protocol that compares starts honestly."""
