"""The wire contract: names, records to OTLP bytes and back; pure."""

from __future__ import annotations

from tracelet.otlp.resource import resource_attributes

__all__ = ["resource_attributes"]
