"""The gateway: OTLP in, the same spool, the same shipper, MLflow out."""
