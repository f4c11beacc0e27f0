"""The host side: command lines, configs, logging and cadence. No mathematics lives here."""
