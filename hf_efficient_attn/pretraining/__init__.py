"""Objectives that need more than a head: replaced-token detection (ELECTRA)."""
