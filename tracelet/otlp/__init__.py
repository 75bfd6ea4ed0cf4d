"""The wire contract: names, and records to OTLP bytes; pure."""
