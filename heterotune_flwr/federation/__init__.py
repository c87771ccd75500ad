"""What happens around a strategy: wire protocol, sampling, ledger, journal, server, launcher."""
