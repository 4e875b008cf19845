"""What is typed becomes a checked job: config, early checks, errors, shorthands, sweeps."""
