"""The configuration: one TOML file, read once into frozen values, its faults named by line."""
