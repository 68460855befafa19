"""Integrations with other libraries. Import each module explicitly to use it."""
