"""The process that carries the spool to its destinations."""
