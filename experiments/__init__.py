"""The commands: flags to frozen configs, then wiring."""
